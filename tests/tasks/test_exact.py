"""Exact figures of a neural policy against listing, closed forms and a run of DPO."""

import math

import pytest
import torch
from torch import tensor

from alignkit.config.model import ModelConfig
from alignkit.config.recipe import load_recipe
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.tdpo import TDPO
from alignkit.policies.load import load_model
from alignkit.policies.tokenizer import load_tokenizer
from alignkit.runs.launch import run_recipe
from alignkit.tasks.exact import (
    completion_tree,
    figures,
    folder_logps,
    folder_optimum,
    kl,
    outcome_rewards,
)


@pytest.fixture(scope="module")
def base(small, small_task):
    return folder_logps(small_task.model_folder, small.prompts, list(small.rewards))


@pytest.fixture(scope="module")
def rewards(small):
    return outcome_rewards(list(small.rewards.values()), small.outside)


def test_outcomes_are_scored_like_single_rows_and_sum_to_one(small, small_task, base):
    config = ModelConfig(name_or_path=str(small_task.model_folder))
    (model, _), tokenizer = load_model(config, device="cpu"), load_tokenizer(config)
    assert base.shape == (len(small.prompts), len(small.rewards) + 1)
    assert base.exp().sum(-1).tolist() == pytest.approx([1.0] * len(base), abs=1e-9)
    for p, prompt in enumerate(small.prompts):
        start = tokenizer(prompt)["input_ids"]
        for k, review in list(enumerate(small.rewards))[::5]:
            row = torch.tensor([*start, *tokenizer(review)["input_ids"], tokenizer.eos_token_id])
            with torch.no_grad():
                logps = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            alone = logps[len(start) - 1 : -1].gather(-1, row[len(start) :, None]).sum()
            assert float(base[p, k]) == pytest.approx(float(alone), abs=1e-4)


def test_the_base_knows_the_grammar_but_leaves_mass_outside(base):
    outside = base[:, -1].exp()
    assert (outside > 1e-5).all()
    assert (outside < 0.05).all()


def test_figures_by_hand():
    reference, policy = (
        tensor(p, dtype=torch.float64).log() for p in ([[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]])
    )
    rewards = outcome_rewards([0.0, 2 * math.log(2)], -2 * math.log(2))
    # beta 2: weights 1/2 * 1, 1/4 * 2, 1/4 * 1/2
    optimum = tensor([[4, 4, 1]], dtype=torch.float64).log().log_softmax(-1)
    found = figures(policy, reference, rewards, optimum=optimum, beta=2.0)
    assert found.reward == pytest.approx(0.5 * math.log(2), abs=1e-12)
    assert found.kl == pytest.approx(0.25 * math.log(2), abs=1e-12)
    assert found.outside == pytest.approx(0.25, abs=1e-12)
    assert found.kl_optimum == pytest.approx(
        0.25 * math.log(9 / 16) + 0.5 * math.log(9 / 8) + 0.25 * math.log(9 / 4), abs=1e-12
    )
    # J_ref = 0, J = 0.5 ln 2 - 2 * 0.25 ln 2 = 0: what the reward gained, the KL took
    assert found.share == pytest.approx(0, abs=1e-12)
    assert figures(policy, reference, rewards).share is None


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_optimum_has_its_closed_form_figures(base, rewards, beta):
    """J* = beta * log Z; every policy misses it by beta * KL(policy || optimum)."""
    optimum = DPO(beta=beta).optimum(rewards, base)
    best = figures(optimum, base, rewards, optimum=optimum, beta=beta)
    log_z = float(torch.logsumexp(base + rewards / beta, -1).mean())
    assert best.kl_optimum == pytest.approx(0, abs=1e-12)
    assert best.share == pytest.approx(1, abs=1e-12)
    assert best.reward - beta * best.kl == pytest.approx(beta * log_z, abs=1e-10)
    start = figures(base, base, rewards, optimum=optimum, beta=beta)
    assert (start.kl, start.share) == (0, 0)
    assert start.reward == pytest.approx(beta * log_z - beta * start.kl_optimum, abs=1e-10)
    assert best.outside < start.outside


def test_kl_counts_the_outside():
    first, second = tensor([0.1, 0.9]).double().log(), tensor([0.9, 0.1]).double().log()
    assert float(kl(first, second)) == pytest.approx(0.8 * math.log(9), abs=1e-7)


def test_dpo_on_the_small_world_nears_its_closed_form_optimum(tmp_path, small, base, rewards):
    objective = DPO(beta=0.75)
    recipe = load_recipe(
        "dpo", [*RUN, f"output_dir={tmp_path / 'run'}", f"objective.beta={objective.beta}"]
    )
    run_recipe(recipe)
    trained = folder_logps(tmp_path / "run" / "model", small.prompts, list(small.rewards))
    optimum = objective.optimum(rewards, base)
    before, after = (
        figures(p, base, rewards, optimum=optimum, beta=objective.beta) for p in (base, trained)
    )
    assert figures(optimum, base, rewards).kl > 1
    assert after.kl_optimum < before.kl_optimum / 6
    assert after.reward > before.reward + 1.2
    assert after.outside < 0.02
    assert 0.8 < after.share < 1


RUN = [
    "data.train=task:reviews_small",
    "train.steps=250",
    "train.batch_size=16",
    "train.learning_rate=1e-3",
    "train.warmup_steps=20",
    "train.adam_betas=[0.9,0.99]",
    "train.save_every=0",
    "train.log_samples_every=0",
]


def test_the_tree_of_completions_lists_every_way_to_leave_it():
    """Prefixes (), (5), (7); at each, one more outcome for what is not listed."""
    tree = completion_tree([tensor([5, 1]), tensor([5, 2, 3]), tensor([7, 1])])
    states = torch.log_softmax(
        torch.randn(tree.states, tree.vocab, generator=torch.Generator().manual_seed(0)).double(),
        -1,
    )
    rows = {(): 0, (5,): 1, (5, 2): 2, (7,): 3}
    assert (tree.states, tree.vocab) == (4, 3)
    want = [
        states[0, 0] + states[1, 0],
        states[0, 0] + states[1, 1] + states[2, 0],
        states[0, 1] + states[3, 0],
        states[0, 2],
        states[0, 0] + states[1, 2],
        states[0, 0] + states[1, 1] + states[2, 2],
        states[0, 1] + states[3, 2],
    ]
    assert len(rows) == tree.states
    assert tree.sequence_logps(states).tolist() == pytest.approx(
        [float(w) for w in want], abs=1e-12
    )


class SoftDPO(DPO):
    """DPO solved token by token: the backup of its soft value (Rafailov et al. 2024,
    arXiv:2404.12358).
    """

    def backup(self, values, reference):
        return self.beta * (reference + values / self.beta).logsumexp(-1)


def test_optima_on_the_tree_of_a_real_model(small, small_task, base, rewards):
    """With the soft value the tree gives DPO's flat closed form; with the mean (TDPO) the law of
    total expectation holds.
    """
    where = (small_task.model_folder, small.prompts, list(small.rewards), rewards)
    flat, tree = folder_optimum(DPO(beta=0.7), *where), folder_optimum(SoftDPO(beta=0.7), *where)
    assert (flat - DPO(beta=0.7).optimum(rewards, base)).abs().max() < 1e-5
    assert (tree - flat).abs().max() < 1e-4
    one_step = folder_optimum(TDPO(beta=0.7), *where)
    assert one_step.exp().sum(-1).tolist() == pytest.approx([1.0] * len(base), abs=1e-9)
    assert (one_step - flat).abs().max() > 0.1  # another optimum, and well above rounding
    assert (
        kl(folder_optimum(TDPO(beta=100.0), *where), DPO(beta=100.0).optimum(rewards, base)) < 1e-6
    ).all()
    assert folder_optimum(TDPO(version=2), *where) is None
