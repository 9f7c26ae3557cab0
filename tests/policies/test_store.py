"""The store of reference log-probs: each row is scored once, whatever the run, and found again bit
for bit.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from world import pairs, save_model

from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.errors import ResourceError
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair
from alignkit.policies.store import cached_in


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return [save_model(base / str(seed), seed) for seed in (0, 1)]


@pytest.fixture
def scored(monkeypatch):
    """How many bundles each pass scored."""
    calls = []
    whole = PolicyPair.cached
    monkeypatch.setattr(
        PolicyPair, "cached", lambda self, b, p: calls.append(len(b)) or whole(self, b, p)
    )
    return calls


def load(folder):
    from alignkit import DPO

    plan = DPO().plan
    return load_pair(
        ModelConfig(name_or_path=str(folder)),
        ReferenceConfig(),
        None,
        plan,
        device="cpu",
        fixed_data=True,
    ), plan


def test_a_second_run_reads_what_the_first_scored(folders, tmp_path, scored):
    bundles = pairs(9)
    pair, plan = load(folders[0])
    expected = pair.cached(bundles, plan)
    scored.clear()
    first = cached_in(tmp_path, pair, bundles, plan)
    again, plan = load(folders[0])
    second = cached_in(tmp_path, again, bundles[::-1], plan)[::-1]
    assert scored == [9]
    for want, a, b in zip(expected, first, second):
        for x, y, z in zip(want.tokens["reference"], a.tokens["reference"], b.tokens["reference"]):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
    assert "read from" in again.notes[-1]
    assert "differ by at most" in again.notes[-1]


def test_rows_are_scored_once_and_only_the_missing_ones(folders, tmp_path, scored):
    bundles = pairs(8)
    pair, plan = load(folders[0])
    cached_in(tmp_path, pair, [*bundles[:5], bundles[0]], plan)
    found = cached_in(tmp_path, pair, bundles, plan)
    assert scored == [5, 3]
    assert [b.uid for b in found] == [b.uid for b in bundles]


def test_another_model_has_its_own_file(folders, tmp_path, scored):
    bundles = pairs(4)
    found = [cached_in(tmp_path, *_args(folder, bundles)) for folder in folders]
    assert scored == [4, 4]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert not torch.allclose(
        found[0][0].tokens["reference"][0], found[1][0].tokens["reference"][0]
    )


@pytest.mark.parametrize(
    ("damage", "difference"), [(1.0, r"1\.0e\+00"), (float("nan"), "inf"), (float("inf"), "inf")]
)
def test_a_damaged_store_is_refused(folders, tmp_path, damage, difference):
    from safetensors.torch import load_file, save_file

    bundles = pairs(4)
    pair, plan = load(folders[0])
    cached_in(tmp_path, pair, bundles, plan)
    file = next(tmp_path.glob("*.safetensors"))
    content = load_file(file)
    save_file({**content, "logps": content["logps"] + damage}, file)
    with pytest.raises(
        ResourceError,
        match=rf"differs from live log-probs by {difference}; it is damaged, delete it",
    ):
        cached_in(tmp_path, pair, bundles, plan)


def _args(folder, bundles):
    pair, plan = load(folder)
    return pair, bundles, plan


class Lazy(Sequence):
    """Bundles that are made when they are asked for, as those of many rows are."""

    def __init__(self, bundles):
        self.bundles = bundles

    def __len__(self):
        return len(self.bundles)

    def __getitem__(self, place):
        one = self.bundles[place]
        return Lazy(one) if isinstance(place, slice) else replace(one, rows=dict(one.rows))


def tensors_kept(score, folder, rows):
    """How many tensors are alive beside the rows while `score(pair, bundles, plan)` is."""
    pair, plan = load(folder)
    prompts = torch.cartesian_prod(torch.arange(3, 23), torch.arange(3, 23))[:rows]
    (pattern,) = pairs(1)
    bundles = Lazy([replace(pattern, prompt=prompt) for prompt in prompts])
    before = tensors_alive()
    filled = score(pair, bundles, plan)
    return len(filled), tensors_alive() - before


def tensors_alive():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("where", ["in memory", "in a new store", "in a filled store"])
def test_what_is_kept_of_many_rows_are_few_tensors(folders, tmp_path, where):
    kept = []
    for rows in (50, 200):
        score = PolicyPair.cached
        if where != "in memory":
            score = partial(cached_in, tmp_path / str(rows))
        if where == "in a filled store":
            tensors_kept(score, folders[0], rows)
        number, tensors = tensors_kept(score, folders[0], rows)
        assert number == rows
        kept.append(tensors)
    assert kept[1] == kept[0] < 20
