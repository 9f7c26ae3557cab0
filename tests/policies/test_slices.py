"""Tensors that lie in rectangles in several files, read whole and in parts."""

import json

import pytest
import torch
from safetensors.torch import save_file

from alignkit.policies.slices import INDEX, OFFSETS, Region, StoredTensors, save_parts

WHOLE = torch.arange(35.0).view(7, 5)


@pytest.fixture
def stored(tmp_path):
    """Seven rows in files of 4 and 3, the second cut in columns too; a number beside them."""
    pieces = {"a": ((0, 0), (4, 5)), "b": ((4, 0), (3, 2)), "c": ((4, 2), (3, 3))}
    for name, (offsets, shape) in pieces.items():
        part = WHOLE[Region(offsets, shape).within(Region((0, 0), (7, 5)))].contiguous()
        index = json.dumps({"weight": {OFFSETS: offsets}})
        save_file({"weight": part}, tmp_path / name, metadata={INDEX: index})
    save_parts({"count": torch.tensor(3)}, tmp_path / "d")
    return StoredTensors(tmp_path / name for name in "abcd")


def test_rectangles_make_the_whole(stored):
    assert torch.equal(stored["weight"], WHOLE)
    assert stored.stored("weight").shape == (7, 5)
    assert int(stored["count"]) == 3
    assert set(stored) == {"weight", "count"}


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_part_can_be_read(stored, first, rows):
    rows = min(rows, 7 - first)
    part = torch.full((rows, 3), -1.0)
    stored.stored("weight").read_region(Region((first, 1), (rows, 3)), part)
    assert torch.equal(part, WHOLE[first : first + rows, 1:4])


def test_a_part_that_no_file_holds_is_noticed(stored):
    del stored.by_name["weight"].pieces[1]
    with pytest.raises(ValueError, match="weight: the files hold 29 of 35 elements"):
        stored["weight"]
