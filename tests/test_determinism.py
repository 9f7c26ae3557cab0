"""Same seed, same run; a run taken up in its middle is the run that was never stopped. Every
objective, bit for bit.
"""

import random
from dataclasses import replace
from importlib import import_module

import numpy
import pytest
import torch
from online_world import more_wanted, online_job, share_of_wanted
from world import make_job, pairs, save_model

from alignkit.config.model import TargetConfig
from alignkit.files import read_jsonl
from alignkit.objectives import OBJECTIVES, locate
from alignkit.training.loop import train

FIXED = {
    "sequence": {"k": 1},
    "pair": {},
    "labelled": {"k": 1, "label": lambda i: torch.tensor([i % 2 == 0])},
    "ranked": {"k": 3},
}
STEPS, TAKEN_UP = 4, 2


def example(name):
    module, cls, _ = locate(name)
    return getattr(import_module(module), cls).examples()[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def noisy(prompts, completions, **columns):
    """A reward that draws from every generator it can reach."""
    noise = random.random() + numpy.random.rand() + float(torch.rand(()))
    return [
        value + noise * i
        for i, value in enumerate(share_of_wanted(prompts, completions, **columns))
    ]


def job(model, out, objective):
    settings = {
        "steps": STEPS,
        "save_every": TAKEN_UP,
        "keep": 9,
        "learning_rate": 0.05,
        "ema_decay": 0.5,
    }
    if "previous" in objective.plan.anchors:
        # its last copy is made after the checkpoint
        settings["target"] = TargetConfig(kind="synced", every=STEPS - 1)
    if objective.plan.data in FIXED:
        bundles = pairs(10, **FIXED[objective.plan.data])
        for name in (
            objective.plan.prefixes
        ):  # what the reference says after a text is scored before training
            bundles = [
                replace(b, tokens={**b.tokens, name: [-ids / len(name) for ids in b.completions]})
                for b in bundles
            ]
        lora = not objective.plan.rewards  # a model that is a reward too is trained whole
        return make_job(model, out, objective, bundles, lora=lora, **settings)
    return online_job(model, out, objective, reward=noisy, judge=more_wanted, **settings)


def run(made, resume=None):
    """Final weights and anchors, and every logged figure but the time."""
    with made.run:
        train(made, resume)
    rows = [
        {k: v for k, v in row.items() if k != "time"} for row in read_jsonl(made.run.metrics_file)
    ]
    return made.pair.state(), rows


def assert_same(found, expected):
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(value, expected[0][name]) for name, value in found[0].items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_taken_up_in_its_middle_is_the_uninterrupted_run(model, tmp_path, name):
    objective = example(name)
    expected = run(job(model, tmp_path, objective))
    (tmp_path / "model").rename(tmp_path / "finished")
    assert_same(run(job(model, tmp_path, objective), "auto"), expected)


@pytest.mark.parametrize("name", ["dpo", "kto", "rpg", "egpo"])
def test_the_same_seed_is_the_same_run(model, tmp_path, name):
    first, second = (run(job(model, tmp_path / folder, example(name))) for folder in "ab")
    assert_same(second, first)
