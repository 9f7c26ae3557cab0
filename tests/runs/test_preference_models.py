"""Reward and preference models, trained from scratch on planted preferences, saved, and used as
rewards and judges.
"""

import json
import random
from itertools import permutations

import pytest
import torch
from world import VOCAB, save_model

from alignkit.config import build_objective, load_recipe
from alignkit.config.data import DataConfig
from alignkit.data.load import check
from alignkit.errors import ConfigError, ModelError
from alignkit.judges import load_judge
from alignkit.losses import plackett_luce_loss
from alignkit.metrics.completions import preference_figures
from alignkit.objectives.reward.preference_model import skew_product
from alignkit.rewards import load_reward_model
from alignkit.runs.launch import run_recipe
from alignkit.runs.trained_model import load_finished

F64 = torch.float64
SETTINGS = [
    "train.batch_size=32",
    "train.learning_rate=1e-2",
    "train.warmup_steps=5",
    "train.save_every=0",
    "train.eval_every=999",
]


def style(completion):
    """0, 1 or 2, by the last word."""
    return int(completion.split()[-1][1:]) % 3


def completions(seed):
    """Texts of three words by style; no text of one seed's set appears in another's of different
    parity.
    """
    source = random.Random(seed)
    words = [f"w{i}" for i in range(3, VOCAB - 2)]  # as many of each style
    texts = {" ".join(source.choices(words, k=3)) for _ in range(900)}
    kept = sorted(t for t in texts if sum(int(w[1:]) for w in t.split()) % 2 == seed % 2)
    return [[t for t in kept if style(t) == s] for s in range(3)]


def pairs(n, seed):
    """n pairs, the three kinds in turn: style s beats style s + 1, modulo 3."""
    by_style, source = completions(seed), random.Random(seed)
    for i in range(n):
        better = i % 3
        yield {
            "prompt": "w3",
            "chosen": " " + source.choice(by_style[better]),
            "rejected": " " + source.choice(by_style[(better + 1) % 3]),
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    save_model(folder / "base")
    for name, rows in {"cycle": pairs(960, 0), "cycle_eval": pairs(300, 1)}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def trained(world, recipe, name, *overrides, steps=240):
    out = world / name
    fields = [
        f"model.name_or_path={world / 'base'}",
        f"output_dir={out}",
        f"train.steps={steps}",
        *SETTINGS,
        *overrides,
    ]
    return run_recipe(load_recipe(recipe, fields)).metrics, out / "model"


def on_cycle(world):
    return [f"data.train={world / 'cycle.jsonl'}", f"data.eval={world / 'cycle_eval.jsonl'}"]


@pytest.fixture(scope="module")
def general(world):
    return trained(world, "preference_model", "general", *on_cycle(world))


def test_the_general_model_holds_a_cycle(general):
    metrics, _ = general
    assert metrics["eval_accuracy"] >= 0.95
    assert metrics["eval_calibration_error"] < 0.1


def test_bradley_terry_cannot(world):
    """Whatever order of the three styles a reward has, it is wrong about one of the three kinds of
    pairs.
    """
    metrics, _ = trained(world, "reward_model", "bradley_terry", *on_cycle(world))
    assert 0.4 < metrics["eval_accuracy"] <= 0.7


def test_it_judges_as_it_was_trained(world, general):
    metrics, folder = general
    rows = list(pairs(300, 1))
    judge = load_judge({"model": str(folder)}, safe=True)
    columns = [[row[c] for row in rows] for c in ("prompt", "chosen", "rejected")]
    verdict = judge(*columns)
    assert verdict.valid.all()
    assert preference_figures(verdict.probability)["brier"] == pytest.approx(
        metrics["eval_brier"], abs=1e-5
    )
    prompts, chosen, rejected = columns
    swapped = judge(prompts, rejected, chosen)
    torch.testing.assert_close(
        verdict.probability + swapped.probability, torch.ones(300, dtype=F64), atol=1e-6, rtol=0
    )
    with pytest.raises(ModelError, match="is a `judge`"):
        load_reward_model(str(folder))


def test_the_classifier_reads_both_and_its_judge_agrees_with_its_figures(world):
    metrics, folder = trained(
        world,
        "preference_model",
        "classifier",
        "objective.form=classifier",
        *on_cycle(world),
        steps=30,
    )
    assert metrics["eval_position_inconsistency"] >= abs(metrics["eval_position_bias"]) >= 0
    rows = list(pairs(300, 1))
    judge = load_judge({"model": str(folder), "both_orders": False}, safe=True)
    columns = [[row[c] for row in rows] for c in ("prompt", "chosen", "rejected")]
    forward, backward = judge(*columns), judge(columns[0], columns[2], columns[1])
    bias = (forward.probability + backward.probability - 1).mean().item()
    assert bias == pytest.approx(metrics["eval_position_bias"], abs=1e-5)


def test_a_reward_model_learns_rankings_and_scores(world):
    """Style 0 above 1 above 2, in rankings of two and three; as a reward it puts unseen texts in
    that order.
    """
    by_style, source = completions(0), random.Random(5)
    rows = [
        {"prompt": "w3", "ranking": [" " + source.choice(by_style[s]) for s in (0, 1, 2)][i % 2 :]}
        for i in range(480)
    ]
    (world / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, folder = trained(
        world,
        "reward_model",
        "ranked",
        f"data.train={world / 'ranked.jsonl'}",
        "data.eval=null",
        steps=60,
    )
    reward = load_reward_model(str(folder))
    scores = [
        torch.tensor(reward(["w3"] * 40, [" " + t for t in texts[:40]])) for texts in completions(1)
    ]
    for better, worse in ((0, 1), (1, 2)):
        assert (scores[better][:, None] > scores[worse]).float().mean() > 0.95
    judge = load_judge({"model": str(folder)}, safe=True)
    verdict = judge(["w3"], [" " + completions(1)[0][0]], [" " + completions(1)[2][0]])
    torch.testing.assert_close(
        verdict.probability,
        (scores[0][0] - scores[2][0]).double().sigmoid()[None],
        atol=1e-5,
        rtol=0,
    )


def test_rankings_that_cannot_be_learned_from_are_named():
    good = {"prompt": "p", "ranking": ["a", "b", "c"]}
    rows = [
        good,
        *(
            {"prompt": "p", "ranking": bad}
            for bad in (["a"], "a", ["a", "a"], ["a", " "], None, ["a", 3])
        ),
    ]
    report, refusal = check(DataConfig(), source=rows, family="ranked")
    found = {name: finding.rows for name, finding in report.findings.items()}
    assert found == {"type": [2, 3, 7], "identical": [4], "empty": [5], "null": [6]}
    assert "expected two or more completions, best first" in str(refusal)
    assert report.format == "ranking"


def test_a_judge_writes_no_text_and_is_no_part_of_a_sum(general):
    with pytest.raises(ModelError, match="reward or preference model, which writes nothing"):
        load_finished(str(general[1]))
    with pytest.raises(ConfigError, match="disagree on `outputs`"):
        build_objective([{"name": "preference_model"}, {"name": "dpo"}])


# ---------------------------------------------------------------- the losses and figures alone


def test_plackett_luce_is_a_distribution_over_orders_and_bradley_terry_for_two():
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)
    orders = torch.stack([rewards[list(order)] for order in permutations(range(4))])
    total = (-plackett_luce_loss(orders, torch.ones(24, 4, dtype=torch.bool))).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-14)
    mask = torch.tensor([[True, True, False]])
    found = plackett_luce_loss(torch.tensor([[0.3, -1.0, 9.0]], dtype=F64), mask)
    assert found.item() == pytest.approx(
        -torch.tensor(1.3, dtype=F64).sigmoid().log().item(), abs=1e-14
    )


def test_the_skew_product_changes_sign_and_contains_bradley_terry():
    a, b = torch.randn(2, 5, 7, dtype=F64)
    torch.testing.assert_close(skew_product(a, b), -skew_product(b, a), atol=0, rtol=0)
    assert (skew_product(a, a) == 0).all()
    one = torch.ones(5, dtype=F64)
    rewards = skew_product(torch.stack([a[:, 0], one], -1), torch.stack([b[:, 0], one], -1))
    torch.testing.assert_close(rewards, a[:, 0] - b[:, 0], atol=1e-15, rtol=0)
    # at 120 degrees: each beats the next
    cycle = torch.tensor([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]])
    assert (skew_product(cycle, cycle.roll(-1, 0)) > 0.8).all()


def test_figures_by_hand():
    # confidence 0.9 three times, right twice; a tie is half right
    p = torch.tensor([0.9, 0.9, 0.1, 0.5], dtype=F64)
    found = preference_figures(p, torch.tensor([0.2, -0.2, 0.0, 0.4]))
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    assert found["calibration_error"] == pytest.approx(abs(2 - 2.7) / 4)
    assert found["brier"] == pytest.approx((0.01 + 0.01 + 0.81 + 0.25) / 4)
    assert (found["position_bias"], found["position_inconsistency"]) == pytest.approx((0.1, 0.2))
