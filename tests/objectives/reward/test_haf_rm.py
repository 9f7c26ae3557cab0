"""HAF-RM: between a reward model and DPO on one network, read where the end token is predicted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from world import pair_rows, run, save_model, write_rows

from alignkit.batches import PairBatch
from alignkit.config import load_recipe
from alignkit.judges import load_judge
from alignkit.losses import dpo_loss, haf_rm_loss, plackett_luce_loss
from alignkit.objectives.reward.haf_rm import HAFRM
from alignkit.oracles.worlds import TabularWorld
from alignkit.rewards import load_reward_model
from alignkit.runs.launch import run_recipe
from alignkit.tensors import last_value

F64 = torch.float64
ROWS = [
    {"prompt": row["prompt"], "chosen": f" {row['chosen']}", "rejected": f" {row['rejected']}"}
    for row in pair_rows(12)
]
SETTINGS = ["train.batch_size=8", "train.learning_rate=1e-2", "train.save_every=0"]
PROMPTS, CHOSEN, REJECTED = ([row[key] for row in ROWS] for key in ROWS[0])


def test_the_reward_stands_at_the_last_own_token():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])
    assert last_value(values, mask).tolist() == [3.0, 5.0, 0.0]


def test_at_the_ends_it_is_its_two_parents():
    """Share 0 is the reward model's loss of these values, share 1 is DPO, to 1e-10 in the gradient
    too; between them it is their mean.
    """
    world = TabularWorld.build(HAFRM().plan)
    tokens = world.tokens().map(lambda t: t.detach())
    values = tokens.extras["values"].requires_grad_()
    policy = tokens.policy.requires_grad_()
    batch = PairBatch.build(world.bundles, tokens)

    rewards = [last_value(t.get("values"), t.mask) for t in (batch.chosen, batch.rejected)]
    ranked = torch.stack(rewards, -1)
    ranking = plackett_luce_loss(ranked, torch.ones_like(ranked, dtype=torch.bool))
    dpo = dpo_loss(*batch.sequence_logps(), beta=0.3)

    for share, wanted in ((0.0, ranking), (1.0, dpo), (0.25, 0.75 * ranking + 0.25 * dpo)):
        (term,) = HAFRM(beta=0.3, share=share).loss(batch).terms
        torch.testing.assert_close(term.values, wanted, atol=1e-10, rtol=0)
        ours, theirs = (
            torch.autograd.grad(loss.sum(), (policy, values), retain_graph=True, allow_unused=True)
            for loss in (term.values, wanted)
        )
        for one, other in zip(ours, theirs):
            other = torch.zeros_like(one) if other is None else other
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_without_a_share_the_run_is_a_reward_models(trained):
    """Share 0 starts at the head that the plain reward model of the same seed starts at, and takes its
    steps. The two lay their rows out differently, so they part by float32's rounding; plain gradient
    steps do not blow it up.
    """
    folder, _ = trained
    plain = ["train.steps=6", "train.optimizer=sgd", "train.learning_rate=0.1"]
    scores = []
    for name, fields in (("haf_rm", ["objective.share=0"]), ("reward_model", [])):
        out = folder / f"{name}_alone"
        overrides = [*SETTINGS, *files(folder), *plain, *fields, f"output_dir={out}"]
        run_recipe(load_recipe(name, overrides))
        reward = load_reward_model(str(out / "model"))
        scores.append(torch.tensor(reward(PROMPTS, CHOSEN) + reward(PROMPTS, REJECTED)))
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_by_hand():
    """Rewards 1 and 0: log(1 + 1/e) = 0.3132617; beside a policy's loss of 0.7."""
    one, nothing = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    value = haf_rm_loss(one, nothing, one * 0.7, share=0.25)
    assert float(value) == pytest.approx(0.75 * 0.3132616875 + 0.25 * 0.7, abs=1e-10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps, by the loop."""
    folder = tmp_path_factory.mktemp("haf")
    save_model(folder / "base")
    write_rows(folder / "pairs.jsonl", ROWS[:8])
    write_rows(folder / "held_out.jsonl", ROWS[8:])
    overrides = [*SETTINGS, *files(folder), f"output_dir={folder / 'run'}", "train.steps=15"]
    return folder, run_recipe(load_recipe("haf_rm", overrides))


def files(folder):
    """The model and the rows of a run."""
    return [
        f"model.name_or_path={folder / 'base'}",
        f"data.train={folder / 'pairs.jsonl'}",
        f"data.eval={folder / 'held_out.jsonl'}",
    ]


def test_both_heads_are_saved_and_the_reward_is_what_was_trained(trained):
    """As a reward and as a judge the model says what its value head said at the end token."""
    folder, result = trained
    model = str(folder / "run" / "model")
    reward = load_reward_model(model)
    margins = torch.tensor(reward(PROMPTS, CHOSEN)) - torch.tensor(reward(PROMPTS, REJECTED))
    held_out = float(margins[8:].mean())
    assert held_out == pytest.approx(result.metrics["eval_rewards/margins"], abs=1e-5)
    assert (margins[:8] > 0).all()

    verdict = load_judge({"model": model}, safe=True)(PROMPTS, CHOSEN, REJECTED)
    torch.testing.assert_close(verdict.probability, margins.double().sigmoid(), atol=1e-6, rtol=0)
    assert isinstance(AutoModelForCausalLM.from_pretrained(model), LlamaForCausalLM)


def test_what_the_reward_reads_ends_before_the_end_token(trained):
    """A text with its end token written out has the same reward, and plain reward models read it."""
    folder, _ = trained
    reward = load_reward_model(str(folder / "run" / "model"))
    plain, ended = reward(["w3 w4", "w3 w4"], [" w5 w6", " w5 w6 </s>"])
    assert plain == pytest.approx(ended, abs=1e-6)
    reward.model.config.alignkit_before_end = False
    assert reward(["w3 w4"], [" w5 w6 </s>"]) != pytest.approx([plain], abs=1e-3)


def test_completions_without_an_end_are_refused(trained, capsys):
    folder, _ = trained
    words = [f"data.train={folder / 'pairs.jsonl'}", "data.append_eos=false", "data.eval=null"]
    out = folder / "refused"
    base = f"model.name_or_path={folder / 'base'}"
    assert run("train", "haf_rm", base, *words, f"output_dir={out}") == 3
    assert "16 completions do not end with the end token" in capsys.readouterr().err
    assert not (out / "model").exists()


def test_completions_that_were_cut_are_refused_with_what_helps(trained, capsys):
    """The held-out rows take up to 5 tokens (two of the prompt, two words, the end), the row to
    learn from 3. At 4 the end token of their longer completion is cut, whatever is appended.
    """
    folder, _ = trained
    write_rows(folder / "short.jsonl", [{"prompt": "w3", "chosen": " w5", "rejected": " w6"}])
    words = [f"data.train={folder / 'short.jsonl'}", f"data.eval={folder / 'held_out.jsonl'}"]
    base = f"model.name_or_path={folder / 'base'}"
    command = ["train", "haf_rm", base, *words, f"output_dir={folder / 'cut'}", *SETTINGS]
    assert run(*command, "data.max_length=4") == 3
    said = capsys.readouterr().err
    assert "held_out.jsonl: 4 completions do not end with the end token" in said
    assert "4 of them were cut at data.max_length=4; set it to 5 or more" in said
    assert "append_eos" not in said

    # The advice helps, either part of it.
    assert run(*command, "data.max_length=5", "train.steps=1") == 0
    cut_prompts = ["data.max_length=4", "data.truncate=start", f"output_dir={folder / 'started'}"]
    assert run(*command, *cut_prompts, "train.steps=1") == 0


def test_an_adapter_is_refused(trained, capsys):
    folder, _ = trained
    words = [f"data.train={folder / 'pairs.jsonl'}", "data.eval=null", "model.adapter={r: 2}"]
    base = f"model.name_or_path={folder / 'base'}"
    assert run("train", "haf_rm", base, *words, f"output_dir={folder / 'lora'}") == 2
    assert "model.adapter: a model that is a reward too is trained whole" in capsys.readouterr().err
