"""Token value: two-hot targets by hand, exact soft values from bins, and a run that guides."""

import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from world import run, save_model, write_rows

from alignkit import TokenValue
from alignkit.losses import soft_value, token_value_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "decoding"))
from tree_world import F64, TreeTarget

RANGE = {"low": -1.0, "high": 1.0}


def test_the_target_is_two_hot():
    """Three bins at -1, 0, 1: a reward of 0.25 is 3/4 of the middle and 1/4 of the last."""
    laws = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log().expand(4, 3)
    scores = torch.tensor([0.25, -1.0, 1.0, 7.0], dtype=F64)
    by_hand = -torch.tensor(
        [0.75 * laws[0, 1] + 0.25 * laws[0, 2], laws[0, 0], laws[0, 2], laws[0, 2]], dtype=F64
    )
    torch.testing.assert_close(token_value_loss(laws, scores, **RANGE), by_hand)


def test_the_value_by_hand():
    laws = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log()
    beta = 0.4
    exact = torch.tensor(0.2 * 2.718281828459045 ** (-1 / beta) + 0.5, dtype=F64)
    exact = (exact + 0.3 * torch.tensor(1 / beta, dtype=F64).exp()).log()
    torch.testing.assert_close(soft_value(laws, **RANGE, beta=beta), exact)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_exact_bins_give_exact_soft_values_and_the_optimum(beta):
    """The minimiser of the loss is the law of the reward after each prefix and token under the
    reference; rewards stand on bins, so that the two-hot target loses nothing. One law serves every
    beta.
    """
    target = TreeTarget(3, 3, beta=beta, seed=11)
    centres = torch.linspace(-1, 1, 5, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randint(0, 5, target.rewards.shape, generator=generator)
    target.rewards = centres[kinds]
    tree = target.tree

    # The gradient of the expected loss is 0 at the law that enumeration gives.
    mass = torch.zeros(tree.states, 3, 5, dtype=F64)
    for leaf, (tokens, prefixes, mask) in enumerate(zip(tree.tokens, tree.prefixes, tree.mask)):
        for token, prefix in zip(tokens[mask], prefixes[mask]):
            mass[prefix, token, kinds[leaf]] += target.logp[leaf].exp()
    laws = (mass / mass.sum(-1, keepdim=True)).clamp(min=1e-300).log()
    leaf_laws = torch.stack([laws[p, t] for p, t in zip(tree.prefixes, tree.tokens)])
    logits = leaf_laws.clone().requires_grad_()
    scores = target.rewards[:, None].expand(tree.mask.shape)
    losses = token_value_loss(logits.log_softmax(-1), scores, **RANGE)
    (target.logp.exp()[:, None] * losses * tree.mask).sum().backward()
    by_node = torch.zeros_like(laws).index_put(
        (tree.prefixes[tree.mask], tree.tokens[tree.mask]), logits.grad[tree.mask], accumulate=True
    )
    assert float(by_node.abs().max()) < 1e-12

    values = soft_value(laws, **RANGE, beta=beta)
    torch.testing.assert_close(values, target.values(), rtol=0, atol=1e-9)
    guided = target.theta.log_softmax(-1) + values
    sigma = (target.logp + target.rewards / beta).log_softmax(0)
    torch.testing.assert_close(tree.sequence_logps(guided), sigma, rtol=0, atol=1e-9)


def test_a_range_that_is_none_is_refused():
    for fields in ({"low": 1.0, "high": 1.0}, {"bins": 1}, {"low": float("nan")}):
        with pytest.raises(ValidationError):
            TokenValue(**fields)


def test_a_run_learns_values_and_guides(tmp_path, capsys):
    """On a random model with a reward that one word decides, guidance finds that word."""
    base = save_model(tmp_path / "base")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w4"} for i in range(3, 7)])
    (tmp_path / "worth.py").write_text(
        "def worth(completions, **_):\n    return [float('w5' in t.split()) for t in completions]\n"
    )
    worth = f"{tmp_path / 'worth.py'}:worth"
    quiet = ["train.eval_every=0", "train.save_every=0", "train.log_samples_every=0"]
    assert (
        run(
            "train", "token_value", f"model.name_or_path={base}", f"rewards.0.function={worth}",
            f"data.train={tmp_path / 'prompts.jsonl'}", "data.format=prompt", "train.steps=40",
            "train.batch_size=4", "train.learning_rate=1e-2", "train.warmup_steps=0",
            "rollout.completions=16", "rollout.max_new_tokens=3", "objective.bins=5",
            "objective.low=0.0", "objective.high=1.0", f"output_dir={tmp_path / 'value'}", *quiet,
        )
        == 0
    )  # fmt: skip
    decoders = {
        "guided": "{method: guide, beta: 0.2, value: %s}",
        "twisted": "{method: smc, beta: 0.2, particles: 4, every: 1, fresh: 2, twist: %s}",
    }
    for name, section in decoders.items():
        section = section % (tmp_path / "value")
        (tmp_path / f"{name}.yaml").write_text(f"decode: {section}\n")

    request = ["--reference", base, "--prompts", tmp_path / "prompts.jsonl", "--reward", worth]
    request += ["--max-new-tokens", 3, "--samples", 32, "--to", tmp_path / "eval.json"]
    files = [tmp_path / f"{name}.yaml" for name in decoders]
    assert run("eval", *files, *request) == 0
    results = json.loads((tmp_path / "eval.json").read_text())
    start = results["base"]["figures"]["score"]["value"]
    for model in results["models"]:
        means = {name: entry["value"] for name, entry in model["figures"].items()}
        assert means["score"] > start + 0.2
        assert 0 < means["kl"] < 3

    # Half of what a guided completion costs is the learned value.
    guided = results["models"][0]["figures"]
    assert guided["sampled"]["value"] == pytest.approx(2 * guided["length"]["value"])

    (tmp_path / "bad.yaml").write_text(f"decode: {{method: guide, beta: 1, value: {base}}}")
    capsys.readouterr()
    assert run("eval", tmp_path / "bad.yaml", *request[:-1], tmp_path / "other.json") == 4
    assert "no run that learned a value" in capsys.readouterr().err
