"""Four processes with shards are one without: losses, weights, and checkpoints that go on in any
number of processes and on any mesh.
"""

import shutil
import sys

import pytest
import sharded_worker
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_processes import SAME
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM
from two_processes import run_to_its_end

from alignkit.files import read_jsonl
from alignkit.policies.slices import StoredTensors

pytestmark = pytest.mark.long

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def on(processes, model, out, cases, *mesh):
    """The cases in that many processes."""
    command = [*LAUNCH, f"--nproc-per-node={processes}", sharded_worker.__file__]
    arguments = [model, out, ",".join(cases), *mesh]
    code, said = run_to_its_end([*command, *map(str, arguments)], timeout=600)
    assert code == 0, said[-3000:]
    return out


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    for case in sharded_worker.CASES:
        sharded_worker.run(case, model, out)
    return out


@pytest.fixture(scope="module")
def four(model, tmp_path_factory):
    return on(4, model, tmp_path_factory.mktemp("four"), sharded_worker.CASES)


def check_same_losses(one, other, case):
    rows, others = (read_jsonl(out / case / "metrics.jsonl") for out in (one, other))
    for a, b in zip(rows, others, strict=True):
        for name in set(SAME) & a.keys():
            relative = 0 if name == "loss" else 1e-5
            assert b[name] == pytest.approx(a[name], abs=1e-5, rel=relative), (name, a["step"])


def difference(first, second, case):
    """The largest difference between the final weights of two runs."""
    weights, others = (load_file(out / f"{case}.safetensors") for out in (first, second))
    assert weights.keys() == others.keys()
    return max(float((others[name] - value).abs().max()) for name, value in weights.items())


@pytest.mark.parametrize("case", sharded_worker.CASES)
def test_four_processes_are_one(one, four, case):
    check_same_losses(one, four, case)
    if case != "adamw":  # Adam enlarges rounding
        assert difference(one, four, case) < 1e-6


@pytest.mark.parametrize("case", ["dpo", "rpg"])
def test_the_model_that_four_wrote_loads_as_the_one_that_one_wrote(one, four, case):
    first, second = (
        AutoModelForCausalLM.from_pretrained(out / case / "model").state_dict()
        for out in (one, four)
    )
    assert first.keys() == second.keys()
    assert all(torch.allclose(second[name], value, atol=1e-6) for name, value in first.items())


def test_torchs_own_reader_reads_the_parts(four, tmp_path):
    """The files' metadata are those of torch.distributed.checkpoint."""
    parts = sorted((four / "dpo" / "checkpoints" / "step-2").glob("policy-*"))
    assert len(parts) == 4
    for part in parts:
        shutil.copy(part, tmp_path)

    ours = StoredTensors(parts)
    theirs = {name: torch.zeros_like(value) for name, value in ours.items()}
    dcp.load(theirs, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


RESUMED = ["dpo", "adamw"]


def taken_up(source, out, cases=RESUMED):
    for case in cases:
        sharded_worker.take_up(case, source, out)
    return out


def test_a_checkpoint_of_four_goes_on_bit_by_bit_on_four(model, four, tmp_path):
    on(4, model, taken_up(four, tmp_path), RESUMED)
    assert [difference(four, tmp_path, case) for case in RESUMED] == [0, 0]


@pytest.mark.parametrize("mesh", [(2,), (4, "replicate=2,shard=2")])
def test_a_checkpoint_of_four_goes_on_on_other_meshes(model, four, tmp_path, mesh):
    processes, *shape = mesh
    on(processes, model, taken_up(four, tmp_path), RESUMED, *shape)
    for case in RESUMED:
        check_same_losses(four, tmp_path, case)
        assert difference(four, tmp_path, case) < 1e-6


def test_a_checkpoint_of_four_goes_on_on_one(model, four, tmp_path):
    for case in RESUMED:
        sharded_worker.take_up(case, four, tmp_path)
        sharded_worker.run(case, model, tmp_path, "auto")
        check_same_losses(four, tmp_path, case)
        assert difference(four, tmp_path, case) < 1e-6


def test_a_checkpoint_of_a_mesh_goes_on_on_four_and_of_one_on_a_mesh(model, one, tmp_path):
    on(4, model, taken_up(one, tmp_path / "mesh", ["dpo"]), ["dpo"], "replicate=2,shard=2")
    assert difference(one, tmp_path / "mesh", "dpo") < 1e-6

    source = on(4, model, tmp_path / "whole", ["dpo"], "replicate=2,shard=2")
    on(4, model, taken_up(source, tmp_path / "four", ["dpo"]), ["dpo"])
    assert difference(source, tmp_path / "four", "dpo") < 1e-6
