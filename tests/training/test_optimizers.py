"""Optimisers and schedules by name: what moves what, equal to torch and transformers, exact on
resuming.
"""

from importlib.util import find_spec

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn
from world import make_job, pairs, save_model

from alignkit.config.train import TrainConfig
from alignkit.errors import ConfigError
from alignkit.objectives.preference.dpo import DPO
from alignkit.training.loop import train
from alignkit.training.optimizer import learning_rate, make_optimizer, outer_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def trained(job, resume=None):
    with job.run:
        result = train(job, resume)
    return result, job.pair.state()


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "muon", "weight_decay": 0.1}, {"optimizer": "adafactor"}, {"schedule": "wsd"}],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_resume_is_bit_equal(model, tmp_path, settings):
    """The uninterrupted run up to step 4, then gone without a word."""
    settings = {"save_every": 4, "steps": 6, **settings}
    _, whole = trained(make_job(model, tmp_path / "a", DPO(beta=0.5), pairs(10), **settings))
    job = make_job(model, tmp_path / "b", DPO(beta=0.5), pairs(10), **settings)
    for part in ("checkpoints", "metrics.jsonl"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "a" / part).rename(tmp_path / "b" / part)
    result, again = trained(job, "auto")
    assert result.resumed_from == 4
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    start = make_job(model, tmp_path / "c", DPO(), pairs(10)).pair.state()
    assert any(not torch.equal(start[name], whole[name]) for name in whole)


class Tied(nn.Module):
    """An embedding, two matrices inside, a vector, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inside = (
            nn.Embedding(7, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        )
        self.head = nn.Linear(4, 7, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.inside(self.embed(ids)))


def steps(model, optimizers, n=3):
    for _ in range(n):
        model(torch.arange(7)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_muon_moves_the_inside_and_adamw_the_rest():
    config = TrainConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.1)
    ours = Tied()
    assert len(outer_weights(ours)) == 2
    optimizer = make_optimizer(config, list(ours.parameters()), ours)
    found = steps(ours, [optimizer])

    theirs = Tied()
    inside = [m.weight for m in theirs.inside]
    biases = [m.bias for m in theirs.inside]
    muon = torch.optim.Muon(inside, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    outside = [
        {"params": [theirs.embed.weight, theirs.head.weight], "weight_decay": 0.1},
        {"params": biases, "weight_decay": 0.0},
    ]
    expected = steps(theirs, [muon, torch.optim.AdamW(outside, lr=0.01)])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)


def test_muons_rate_and_state_are_one_optimisers():
    ours = Tied()
    optimizer = make_optimizer(TrainConfig(optimizer="muon"), list(ours.parameters()), ours)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in steps(ours, [optimizer], 1).items())
    assert len(optimizer.state_dict()["state"]) == len(before)
    with pytest.raises(ConfigError, match="none of them is trained here"):
        make_optimizer(TrainConfig(optimizer="muon"), [ours.embed.weight], ours)


SCHEDULES = {
    "cosine": lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(
        o, 5, 40, min_lr_rate=0.1
    ),
    "wsd": lambda o: transformers.get_wsd_schedule(
        o, 5, 8, num_training_steps=40, min_lr_ratio=0.1
    ),
    "inverse_sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, 5),
    "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 5, 40),
    "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_the_warm_up_schedules_are_transformers(name):
    floor = 0.1 if name in ("cosine", "wsd") else 0.0
    decay = {"decay_steps": 8} if name == "wsd" else {}
    config = TrainConfig(
        schedule=name, learning_rate=2.0, warmup_steps=5, learning_rate_floor=floor, **decay
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    factor = SCHEDULES[name](optimizer).lr_lambdas[0]
    expected = [2.0 * factor(step) for step in range(5, 41)]
    assert [learning_rate(config, step, 40) for step in range(5, 41)] == pytest.approx(expected)
    assert learning_rate(config, 0, 40) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adamw_8bit"}, "needs the package bitsandbytes"),
        ({"optimizer": "muon", "shard": True}, "whole matrices"),
        ({"decay_steps": 3}, "belongs to schedule wsd"),
        ({"optimizer": "adam"}, "adafactor"),
    ],
)
def test_what_cannot_run_is_refused(settings, words):
    if settings.get("optimizer") == "adamw_8bit" and find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**settings)
