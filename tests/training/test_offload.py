"""Optimiser state that waits in the CPU's memory: the same numbers, a part at a time."""

import pytest
import torch
from pydantic import ValidationError
from world import make_job, pairs, save_model

from alignkit.config.train import TrainConfig
from alignkit.objectives.preference.dpo import DPO
from alignkit.training import offload
from alignkit.training.loop import train
from alignkit.training.offload import Offloaded

ROOM = 2048  # bytes; the largest matrix of the model has 2,048


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small(monkeypatch):
    """Little room, so that a step takes many parts."""
    monkeypatch.setattr(Offloaded.__init__, "__defaults__", (ROOM,))


def trained(model, out, resume=None, **settings):
    settings = {"save_every": 2, "steps": 4, **settings}
    job = make_job(model, out, DPO(beta=0.5), pairs(10), **settings)
    with job.run:
        train(job, resume)
    return job.pair.state()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_results_are_bit_equal_also_after_a_checkpoint(model, tmp_path, small, optimizer):
    plain = trained(model, tmp_path / "plain", optimizer=optimizer)
    moved = trained(model, tmp_path / "moved", optimizer=optimizer, offload=True)
    assert all(torch.equal(moved[name], value) for name, value in plain.items())

    # what one way saved, the other takes up
    (tmp_path / "again").mkdir()
    for part in ("checkpoints", "metrics.jsonl"):
        (tmp_path / "plain" / part).rename(tmp_path / "again" / part)
    again = trained(model, tmp_path / "again", "auto", optimizer=optimizer, offload=True)
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_a_step_takes_no_more_at_once_than_there_is_room_for():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(8, n)) for n in (3, 4, 20, 1, 2)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    rule, plain = torch.optim.AdamW(parameters), torch.optim.AdamW(copies)
    seen = []
    step = rule.step
    rule.step = lambda: (
        seen.append([p.shape[1] for p in parameters if p.grad is not None]),
        step(),
    )
    moved = Offloaded(rule, room=8 * 4 * 8)

    for _ in range(2):
        for one, other in zip(parameters, copies):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        parameters[1].grad = copies[1].grad = None
        moved.step()
        plain.step()
    assert seen == [[3], [20], [1, 2]] * 2
    assert all(torch.equal(one, other) for one, other in zip(parameters, copies))
    assert parameters[0].grad is not None
    assert parameters[1].grad is None
    assert parameters[1] not in moved.state


def test_gradients_are_there_after_a_step_that_fails():
    parameter = torch.nn.Parameter(torch.ones(2))
    rule = torch.optim.SGD([parameter], lr=1.0)
    rule.step = lambda: 1 / 0
    parameter.grad = torch.ones(2)
    with pytest.raises(ZeroDivisionError):
        Offloaded(rule).step()
    assert parameter.grad is not None
    assert offload.ROOM == 256 * 2**20  # what `alignkit plan` counts with


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [("sgd", "sgd keeps no state"), ("adamw_8bit", "adamw_8bit")],
)
def test_what_has_nothing_to_offload_is_refused(optimizer, words):
    with pytest.raises(ValidationError, match=words):
        TrainConfig(optimizer=optimizer, offload=True)
