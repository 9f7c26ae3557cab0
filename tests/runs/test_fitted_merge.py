"""Fitted weights against enumeration on tabular laws, and on models that do not disturb each other."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from world import run, save_model, write_rows

from alignkit.errors import ConfigError
from alignkit.objectives.vocabulary_divergences import distillation_loss
from alignkit.runs.fitted_merge import fit_weights
from alignkit.runs.merge import MergeRequest

F64 = torch.float64


def tabular(start, moves):
    """The laws of start + sum of weight * move, [contexts, V], each model on all contexts."""
    own = [(start + move).log_softmax(-1) for move in moves]

    def laws(weights):
        for number, target in enumerate(own):
            merged = start + sum(w * move for w, move in zip(weights, moves))
            yield number, merged.log_softmax(-1), target

    return laws


def noise(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_the_weights_are_the_enumerated_minimum():
    """The lowest point of a grid around what was found is what was found."""
    start, moves = noise(6, 5, seed=0), noise(2, 6, 5, seed=1)
    fit = fit_weights(tabular(start, moves), [6, 6])

    def divergence(weights):
        """Of every pair of weights [n, 2] at once: [n]."""
        merged = start + torch.einsum("nm,mcv->ncv", weights, moves)
        own = (start + moves).unsqueeze(1).expand(-1, len(weights), -1, -1)
        parts = [distillation_loss(merged, target, divergence="jsd").mean(-1) for target in own]
        return sum(parts)

    line = torch.linspace(-0.5, 1.5, 81, dtype=F64)
    grid = torch.cartesian_prod(line, line)
    values = divergence(grid)
    best = values.argmin()
    assert fit.weights == pytest.approx(grid[best].tolist(), abs=0.0126)  # half a step of the grid
    assert fit.fitted <= float(values[best])

    ends = divergence(torch.tensor([fit.weights, [0.5, 0.5]], dtype=F64))
    assert [fit.fitted, fit.equal] == pytest.approx(ends.tolist(), abs=1e-12)
    assert fit.fitted < fit.equal - 1e-4


def test_models_that_do_not_disturb_each_other_are_kept_whole():
    """Each moves the laws of its own prompts alone, so that weights of 1 lose nothing."""
    start, moves = noise(6, 5, seed=2), noise(2, 6, 5, seed=3)
    moves[0, 3:] = 0
    moves[1, :3] = 0

    def laws(weights):
        for number, merged, own in tabular(start, moves)(weights):
            rows = slice(0, 3) if number == 0 else slice(3, 6)
            yield number, merged[rows], own[rows]

    fit = fit_weights(laws, [3, 3])
    assert fit.weights == pytest.approx([1.0, 1.0], abs=1e-4)
    assert fit.equal > 0.01
    assert fit.fitted < 1e-9


def test_one_model_is_itself():
    assert fit_weights(tabular(noise(4, 5, seed=4), noise(1, 4, 5, seed=5)), [4]).weights == [1.0]


def test_the_command_finds_them_for_models_on_disk(tmp_path, monkeypatch):
    """Two models that moved the output rows of other words, and prompts that both answer."""
    monkeypatch.chdir(tmp_path)
    base = save_model(tmp_path / "base")
    for name, seed in (("one", 1), ("two", 2)):
        save_model(tmp_path / name)
        network = AutoModelForCausalLM.from_pretrained(base)
        step = torch.randn(
            network.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed)
        )
        network.lm_head.weight.data += 0.5 * step
        network.save_pretrained(tmp_path / name)
    for name in ("one", "two"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(3, 8)])

    fits = ["--fit", "one.jsonl", "--fit", "two.jsonl"]
    assert run("merge", "one", "two", "--toward", "base", *fits, "--to", "merged") == 0
    record = json.loads(Path("merged/merge.json").read_text())
    weights = [model["weight"] for model in record["models"]]
    assert weights != [0.5, 0.5]
    assert record["divergence"]["fitted"] < record["divergence"]["equal_weights"]

    start, one, two, merged = (
        AutoModelForCausalLM.from_pretrained(name).lm_head.weight.detach()
        for name in ("base", "one", "two", "merged")
    )
    wanted = start + weights[0] * (one - start) + weights[1] * (two - start)
    torch.testing.assert_close(merged, wanted, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_fitted_is_refused():
    for options in ({"weights": [0.5, 0.5]}, {"method": "slerp"}, {"tensors": {"*": [1, 1]}}):
        with pytest.raises(ConfigError, match="--fit finds the weights"):
            MergeRequest(["a", "b"], Path("m"), fit=["p"], **options)
    with pytest.raises(ConfigError, match="3 times for 2 models"):
        MergeRequest(["a", "b"], Path("m"), fit=["p", "q", "r"])
