"""Gradients of bfloat16 weights that are summed over processes in float32: rounded once, at the end."""

import sys

import pytest
import reduce_worker
import torch
from safetensors.torch import load_file
from two_processes import run_to_its_end
from world import save_model

PROCESSES = 4  # a sum of two is rounded once in any dtype


@pytest.mark.long
def test_the_mean_is_that_of_float32_bit_by_bit(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    model = save_model(tmp_path / "model")
    command = [sys.executable, *launch, reduce_worker.__file__, str(model), str(tmp_path)]
    code, said = run_to_its_end(command)
    assert code == 0, said[-3000:]

    own, plain, summed = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("own", "weights", "float32")
    )
    assert own.keys() == plain.keys() == summed.keys()
    for name, parts in own.items():
        mean = parts.float().mean(0).to(torch.bfloat16)
        assert summed[name].dtype == torch.bfloat16
        assert torch.equal(summed[name], mean), name
    assert any(not torch.equal(plain[name], value) for name, value in summed.items())
