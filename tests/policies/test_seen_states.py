"""A frozen anchor reads a rollout's rows once for the credit and the loss, with the same results."""

import pytest
import torch
from online_world import online_job
from tiny_models import random_bundles, write_model
from world import save_model

from alignkit.batches import Plan
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.kl import exact
from alignkit.objectives.online.rpg import RPG
from alignkit.policies import seen_states
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair
from alignkit.training.loop import train

WITH_KL = Plan("pair", statistics={"kl": lambda policy, anchor, _: exact(policy, anchor)})


@pytest.fixture
def asked(monkeypatch):
    """The anchors whose hidden states were computed, in turn."""
    names = []
    states = PolicyPair.states

    def counted(self, name, rows):
        names.append(name)
        return states(self, name, rows)

    monkeypatch.setattr(PolicyPair, "states", counted)
    return names


def make(tmp_path, kind):
    folder = write_model(tmp_path / "model", initializer_range=0.1)
    config = ModelConfig(name_or_path=str(folder))
    return load_pair(config, ReferenceConfig(kind=kind), None, WITH_KL, fixed_data=False)


@pytest.mark.parametrize(("kind", "readings"), [("frozen", 1), ("ema", 2)])
def test_the_second_reading_is_the_first_ones_to_the_bit(tmp_path, asked, kind, readings):
    pair = make(tmp_path, kind)
    bundles = random_bundles(3)
    with torch.no_grad():
        first = pair.logps(bundles, WITH_KL, again=True)
    second = pair.logps(bundles, WITH_KL)
    assert len(asked) == readings
    assert torch.equal(first.extras["kl"], second.extras["kl"].detach())
    assert torch.equal(first.anchors["reference"], second.anchors["reference"])


def test_states_wait_for_their_own_rows_until_the_next_step(tmp_path, asked):
    pair = make(tmp_path, "frozen")
    bundles = random_bundles(3)
    for act, readings in [
        (lambda: pair.logps(bundles, WITH_KL, again=True), 1),
        (lambda: pair.logps(bundles[:2], WITH_KL), 2),  # other rows
        (lambda: pair.logps(bundles, WITH_KL), 2),
        (lambda: pair.logps(bundles, WITH_KL, again=True), 3),  # once
        (lambda: pair.after_step(1), 3),
        (lambda: pair.logps(bundles, WITH_KL), 4),
    ]:
        act()
        assert len(asked) == readings


def test_a_run_is_the_same_without_room_for_states(tmp_path, asked, monkeypatch):
    trained = []
    model = save_model(tmp_path / "model")
    for limit in (seen_states.LIMIT, 0):
        monkeypatch.setattr(seen_states, "LIMIT", limit)
        before = len(asked)
        job = online_job(model, tmp_path / str(limit), RPG(beta=0.3), steps=3)
        with job.run:
            train(job)
        trained.append((job.pair.state(), len(asked) - before))
    (first, fewer), (second, more) = trained
    assert more == 2 * fewer
    assert all(torch.equal(first[name], second[name]) for name in first)
