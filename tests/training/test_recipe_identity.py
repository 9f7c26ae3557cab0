"""Checkpoints of earlier versions know fewer fields: they belong to every run that leaves the
fields added since at their defaults.
"""

import json
from pathlib import Path

import pytest

from alignkit.config.recipe import load_recipe
from alignkit.runs.resume import identity_of
from alignkit.training.identity import compare, differences_between, is_longer_run

# What `alignkit train dpo train.steps=20` wrote before the tree of folders was made.
EARLIER = json.loads((Path(__file__).parent / "identity_of_earlier_version.json").read_text())
HASHES = {key: EARLIER[key] for key in ("rows", "tokenizer")}


def identity(*overrides):
    """The same run today, its `auto` fields as that run resolved them."""
    resolved = [
        f"{section}.{field}={EARLIER[section][field]}"
        for section, field in [
            ("model", "dtype"),
            ("model", "attention"),
            ("reference", "kind"),
            ("train", "dtype"),
            ("train", "metric"),
        ]
    ]
    recipe = load_recipe("dpo", ["train.steps=20", *resolved, *overrides])
    return {**identity_of(recipe), **HASHES, "weights": {"model": "abc"}}


def test_a_checkpoint_of_an_earlier_version_belongs_to_the_same_run_today():
    assert differences_between(EARLIER, identity()) == []
    assert not is_longer_run(EARLIER, identity())
    assert is_longer_run(EARLIER, identity("train.steps=30"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.top_k=5", "rollout.top_k: None -> 5"),
        ("train.learning_rate_floor=0.5", "train.learning_rate_floor: None -> 0.5"),
        ("model.add_tokens=[<call>]", "model.add_tokens: None -> ['<call>']"),
        ("train.learning_rate=1e-3", "train.learning_rate: 0.0005 -> 0.001"),
        ("objective.beta=0.5", "objective.beta: 1.0 -> 0.5"),
    ],
)
def test_what_is_not_at_its_default_tells_two_runs_apart(override, words):
    assert differences_between(EARLIER, identity(override)) == [words]
    assert not is_longer_run(EARLIER, identity(override, "train.steps=30"))


def test_entries_of_lists_are_named_by_their_numbers():
    old = {"rewards": [{"function": "a.py:f", "weight": 1.0}, {"model": "m"}], "stop": ["a"]}
    new = {"rewards": [{"function": "a.py:f", "weight": 2.0}, {"model": "n"}], "stop": ["b"]}
    assert compare(old, new) == [
        "rewards.0.weight: 1.0 -> 2.0",
        "rewards.1.model: m -> n",
        "stop: ['a'] -> ['b']",
    ]
    assert compare(old, {**old, "rewards": []}) == [f"rewards: {old['rewards']} -> []"]


def without(nested, path):
    key, *rest = path
    if not rest:
        return {name: value for name, value in nested.items() if name != key}
    return {**nested, key: without(nested[key], rest)}


def test_every_field_may_have_been_added_later():
    now = identity()
    default = identity_of(load_recipe("dpo"))
    paths = [
        (section, field)
        for section, fields in default.items()
        if isinstance(fields, dict) and section != "objective"
        for field in fields
    ]
    changed = [path for path in paths if differences_between(without(now, path), now)]
    # what the recipe or the run sets itself is no default, so its absence is a difference
    given = {
        ("model", "name_or_path"),
        ("model", "dtype"),
        ("model", "attention"),
        ("reference", "kind"),
        ("train", "steps"),
        ("train", "batch_size"),
        ("train", "learning_rate"),
        ("train", "schedule"),
        ("train", "warmup_steps"),
        ("train", "dtype"),
        ("train", "metric"),
    }
    assert len(paths) > 40
    assert set(changed) <= given, set(changed) - given


def test_elements_of_a_list_are_compared_field_by_field():
    now = identity("rewards=[{function: 'tests/nothing.py:score'}]")
    before = {**now, "rewards": [{"function": now["rewards"][0]["function"]}]}
    assert differences_between(before, now) == []

    heavier = {**now, "rewards": [{**now["rewards"][0], "weight": 2.0}]}
    assert differences_between(before, heavier) != []
