"""A rollout's rows are read once by the policy for the credit and the loss, with the same results."""

import pytest
import torch
from online_world import online_job
from tiny_models import random_bundles, write_model
from world import save_model

from alignkit.batches import Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.kl import exact
from alignkit.objectives.online.rpg import RPG
from alignkit.policies import kept_passes
from alignkit.policies.load import load_pair
from alignkit.policies.module import PolicyModule
from alignkit.training.loop import train

WITH_KL = Plan("pair", statistics={"kl": lambda policy, anchor, _: exact(policy, anchor)})
ROOM = 10_000


@pytest.fixture
def passes(monkeypatch):
    """Whether each forward of a network kept a graph, in turn."""
    graphs = []
    forward = PolicyModule.forward

    def counted(self, *arguments, **options):
        graphs.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(PolicyModule, "forward", counted)
    return graphs


def make(tmp_path, kind="frozen", **model):
    folder = write_model(tmp_path / "model", initializer_range=0.1)
    config = ModelConfig(name_or_path=str(folder), **model)
    return load_pair(config, ReferenceConfig(kind=kind), None, WITH_KL, fixed_data=False)


def credit_and_loss(pair, bundles, room):
    """What the credit read, what the loss read, and the loss's gradient."""
    with torch.no_grad():
        first = pair.logps(bundles, WITH_KL, again=room)
    second = pair.logps(bundles, WITH_KL)
    (second.policy.sum() + second.extras["kl"].sum()).backward()
    gradients = [p.grad.clone() for p in pair.parameters()]
    for parameter in pair.parameters():
        parameter.grad = None
    return first, second, gradients


def test_both_readings_and_the_gradient_are_those_of_two_passes_to_the_bit(tmp_path, passes):
    pair = make(tmp_path)
    bundles = random_bundles(3)
    passes.clear()  # the probe's
    own, own_loss, own_gradients = credit_and_loss(pair, bundles, 0)
    assert len(passes) == 4  # each time with the anchor's
    first, second, gradients = credit_and_loss(pair, bundles, ROOM)
    assert len(passes) == 6
    assert not first.policy.requires_grad
    assert second.policy.requires_grad
    for one, other in ((first, own), (second, own_loss)):
        assert torch.equal(one.policy, other.policy)
        assert torch.equal(one.anchors["reference"], other.anchors["reference"])
        assert one.extras.keys() == other.extras.keys()
        assert all(torch.equal(one.extras[name], other.extras[name]) for name in one.extras)
    assert all(torch.equal(a, b) for a, b in zip(gradients, own_gradients, strict=True))


def test_a_pass_waits_for_its_own_rows_until_the_policy_moves(tmp_path, passes):
    pair = make(tmp_path)
    bundles = random_bundles(3)
    tokens = pair._rows(bundles).input_ids.numel()

    def read(room=0, some=bundles, graph=False):
        passes.clear()
        with torch.set_grad_enabled(graph):
            pair.logps(some, WITH_KL, again=room)
        return passes.count(True)

    def moved():
        with torch.no_grad():
            next(iter(pair.parameters())).mul_(1.5)

    assert read(room=tokens) == 1  # there is room
    assert read(graph=True, some=bundles[:2]) == 1  # other rows
    assert read(graph=True) == 0  # waits
    assert read(graph=True) == 1  # once
    assert read(room=tokens - 1) == 0  # no room
    for forgotten in (moved, pair.forget, lambda: pair.after_step(1)):
        assert read(room=tokens) == 1
        forgotten()
        assert read(graph=True) == 1
        pair.forget()
    assert read(room=2 * tokens) == 1
    assert read(room=2 * tokens) == 1
    pair.after_step(1)
    assert read(room=tokens) == 1  # what was forgotten takes no room


@pytest.mark.parametrize("case", ["moving anchor", "dropout"])
def test_a_pass_that_would_not_be_the_same_is_made_twice(tmp_path, passes, case):
    if case == "dropout":
        pair = make(tmp_path, "auto", adapter=AdapterConfig(r=2, dropout=0.1))
    else:
        pair = make(tmp_path, "ema")
    passes.clear()
    with torch.no_grad():
        pair.logps(random_bundles(3), WITH_KL, again=ROOM)
    assert not any(passes)


def test_a_run_is_the_same_with_every_pass_made_twice(tmp_path, passes, monkeypatch):
    trained = []
    model = save_model(tmp_path / "model")
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(kept_passes, "_repeats", lambda policy: False)
        passes.clear()
        job = online_job(model, tmp_path / str(keeps), RPG(beta=0.3), steps=3)
        with job.run:
            train(job)
        trained.append((job.pair.state(), len(passes)))
    (first, fewer), (second, more) = trained
    assert more > fewer
    assert all(torch.equal(first[name], second[name]) for name in first)
