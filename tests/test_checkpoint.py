"""Checkpoints are whole or absent, damage is named, and nothing but our own folders is ever deleted."""

import json
import os

import pytest
import torch

from alignkit import checkpoint
from alignkit.errors import CheckpointError

TENSORS = {"policy": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"0.step": torch.tensor(3.0)}}


def save(folder, step, **tensors):
    return checkpoint.save(folder, step, {**TENSORS, **tensors}, {"note": [1, None, "x"]}, {"seed": 0})


def test_round_trip_is_bit_equal(tmp_path):
    weights = {"a": torch.randn(5, 4, dtype=torch.float64), "b": torch.randn(3).bfloat16(), "c": torch.tensor([True, False])}
    save(tmp_path, 7, policy=weights)
    found = checkpoint.load(tmp_path / "step-7")
    assert (found.step, found.state, found.identity) == (7, {"note": [1, None, "x"]}, {"seed": 0})
    assert all(
        torch.equal(found.tensors["policy"][k], v) and found.tensors["policy"][k].dtype == v.dtype for k, v in weights.items()
    )


def test_views_of_one_storage_are_saved_whole(tmp_path):
    base = torch.arange(10.0)
    save(tmp_path, 1, policy={"left": base[:4], "right": base[2:], "wide": base[:1].expand(3)})
    found = checkpoint.load(tmp_path / "step-1").tensors["policy"]
    assert torch.equal(found["left"], base[:4])
    assert torch.equal(found["right"], base[2:])
    assert torch.equal(found["wide"], torch.zeros(3))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "policy.safetensors").unlink(), "policy.safetensors is missing"),
        (lambda p: os.truncate(p / "policy.safetensors", 20), "policy.safetensors has 20 bytes"),
        (lambda p: flip(p / "policy.safetensors"), "policy.safetensors does not match its SHA-256"),
        (lambda p: flip(p / "state.json"), "state.json does not match its SHA-256"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1'), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"format": 9, "files": {}}'), "format 9 is newer"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, damage, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found, skipped = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert [v.step for v in skipped] == [2]
    assert reason in skipped[0].reason
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "step-2")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)


def test_no_valid_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])
    flip(save(tmp_path, 3) / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"step-3: policy\.safetensors does not match"):
        checkpoint.newest(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    path = save(tmp_path / "run", 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"sha256": "", "bytes": 0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the folder" in checkpoint.check(path)


def test_prune_keeps_the_newest_the_best_and_everything_foreign(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoint.write_json(tmp_path / "best.json", {"step": 2})
    (tmp_path / "step-1" / "manifest.json").unlink()  # not provably ours any more
    (tmp_path / "step-99x").mkdir()
    (tmp_path / ".tmp-step-6-123").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.json", "step-1", "step-2", "step-4", "step-5", "step-99x"]
    assert [(v.step, v.reason is None, v.best) for v in checkpoint.verify(tmp_path)] == [
        (1, False, False), (2, True, True), (4, True, False), (5, True, False),
    ]  # fmt: skip


def test_a_disk_that_refuses_leaves_the_old_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.check(tmp_path / "step-1") is None


def test_optimizer_round_trip(tmp_path):
    def make():
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(3, 2))
        return w, torch.optim.AdamW([{"params": [w], "weight_decay": 0.1}], lr=0.1, betas=(0.8, 0.99))

    def step(w, optimizer):
        optimizer.zero_grad()
        (w**2).sum().backward()
        optimizer.step()

    w, optimizer = make()
    step(w, optimizer)
    tensors, state = checkpoint.optimizer_tensors(optimizer)
    checkpoint.save(tmp_path, 1, {"optimizer": tensors, "policy": {"w": w}}, json.loads(json.dumps(state)), {})
    step(w, optimizer)

    other, fresh = make()
    found = checkpoint.load(tmp_path / "step-1")
    other.data.copy_(found.tensors["policy"]["w"])
    checkpoint.load_optimizer(fresh, found.tensors["optimizer"], found.state)
    step(other, fresh)
    assert torch.equal(w, other)
