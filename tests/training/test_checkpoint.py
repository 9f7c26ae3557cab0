"""Checkpoints are whole or absent, damage is named, and nothing but our own folders is ever
deleted.
"""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alignkit
from alignkit import files
from alignkit.errors import CheckpointError
from alignkit.training import checkpoint
from alignkit.training.snapshot import load_optimizer_state, optimizer_state

TENSORS = {
    "policy": {"w": torch.arange(6.0).reshape(2, 3)},
    "optimizer": {"0.step": torch.tensor(3.0)},
}


def save(folder, step, **tensors):
    return checkpoint.save(
        folder, step, {**TENSORS, **tensors}, {"note": [1, None, "x"]}, {"seed": 0}
    )


def test_round_trip_is_bit_equal(tmp_path):
    weights = {
        "a": torch.randn(5, 4, dtype=torch.float64),
        "b": torch.randn(3).bfloat16(),
        "c": torch.tensor([True, False]),
    }
    save(tmp_path, 7, policy=weights)
    found = checkpoint.load(tmp_path / "step-7")
    assert (found.step, found.state, found.identity) == (7, {"note": [1, None, "x"]}, {"seed": 0})
    assert all(
        torch.equal(found.tensors["policy"][k], v) and found.tensors["policy"][k].dtype == v.dtype
        for k, v in weights.items()
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
        (
            lambda p: (p / "manifest.json").write_text('{"format": 1'),
            "manifest.json cannot be read",
        ),
        (
            lambda p: (p / "manifest.json").write_text('{"format": 9, "files": {}}'),
            "format 9 is newer",
        ),
        (
            lambda p: change(p / "manifest.json", '"seed": 0', '"seed": 1'),
            "manifest.json does not match its own SHA-256",
        ),
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


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


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
    del manifest["sha256"]
    # forged throughout
    (path / "manifest.json").write_text(
        json.dumps({**manifest, "sha256": files.sha256_of_json(manifest)})
    )
    assert "outside the folder" in checkpoint.check(path)


def test_prune_keeps_the_newest_the_best_and_everything_foreign(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoint.mark_best(tmp_path, 2)
    (tmp_path / "step-1" / "manifest.json").unlink()  # not provably ours any more
    (tmp_path / "step-99x").mkdir()
    (tmp_path / ".tmp-step-6-123").mkdir()
    checkpoint.prune(tmp_path, 5, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.json",
        "step-1",
        "step-2",
        "step-4",
        "step-5",
        "step-99x",
    ]
    assert [(v.step, v.reason is None, v.best) for v in checkpoint.verify(tmp_path)] == [
        (1, False, False), (2, True, True), (4, True, False), (5, True, False),
    ]  # fmt: skip


def test_a_fresh_checkpoint_takes_the_place_of_a_damaged_one_and_counts_as_the_newest(tmp_path):
    """A run went to step 4, its checkpoint was damaged; the run goes on from step 1 and comes by
    steps 2 and 4 again.
    """
    save(tmp_path, 1)
    flip(save(tmp_path, 4) / "policy.safetensors")
    save(tmp_path, 2)
    checkpoint.prune(tmp_path, 2, keep=1)
    assert checkpoint.steps(tmp_path) == [2, 4]  # the damaged one is not the one that is kept
    assert checkpoint.newest(tmp_path)[0].step == 2
    save(tmp_path, 4)
    checkpoint.prune(tmp_path, 4, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]
    assert checkpoint.newest(tmp_path)[0].step == 4


def test_links_are_neither_read_nor_followed(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 1)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step-1").symlink_to(elsewhere)
    assert checkpoint.newest(folder) == (None, [])
    for step in (2, 3):
        save(folder, step)
    (folder / ".tmp-step-9-1").symlink_to(elsewhere)
    checkpoint.prune(folder, 3, keep=1)
    assert checkpoint.check(elsewhere) is None


def check_untouched(folder):
    assert [p.name for p in folder.iterdir()] == ["step-1"]
    assert checkpoint.check(folder / "step-1") is None


def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_one(tmp_path):
    """Files that stop growing, as on a full disk or under a quota; in a process of its own, because
    the limit is a process's.
    """
    save(tmp_path, 1)
    code = f"""
import resource, torch
from pathlib import Path
from alignkit.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    checkpoint.save(Path({str(tmp_path)!r}), 2, {{"policy": {{"w": torch.zeros(2000)}}}}, {{}}, {{}})
except checkpoint.CheckpointError as error:
    print(error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 could not write checkpoint step-2"), done
    assert "File too large" in done.stdout
    assert "--resume auto (older checkpoints are untouched)" in done.stdout
    check_untouched(tmp_path)


@pytest.mark.parametrize(
    ("owner", "name", "number", "words"),
    [
        (Path, "mkdir", errno.EROFS, "Read-only file system"),
        (files, "fsync", errno.ENOSPC, "No space left on device"),
    ],
    ids=["read-only", "full when it is synced"],
)
def test_a_disk_that_refuses_is_said(tmp_path, monkeypatch, owner, name, number, words):
    save(tmp_path, 1)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, 2)
    check_untouched(tmp_path)


def test_stray_files_are_nobodys_business(tmp_path):
    """What file browsers and archives leave, and names that only look like steps."""
    path = save(tmp_path, 3)
    (path / "._policy.safetensors").write_bytes(b"\0\5\26\7")
    (path / ".DS_Store").write_bytes(b"")
    for name in ("step-²", "step-٣", "step-", "step-03", "step--1", "step-9 copy"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [3]
    assert [v.reason for v in checkpoint.verify(tmp_path)] == [None]
    newest, skipped = checkpoint.newest(tmp_path)
    assert set(newest.tensors) == set(TENSORS)
    assert skipped == []


def test_a_manifest_that_is_a_folder_is_damage(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest.step == 1
    assert "manifest.json cannot be read (Is a directory)" in skipped[0].reason


@pytest.mark.parametrize(
    "content", ["[1]", "1", "null", '{"step": null}', '{"step": [1]}', '{"step": "²"}', "{", ""]
)
def test_a_broken_note_of_the_best_step_is_no_note(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "best.json").write_text(content)
    assert [(v.step, v.best) for v in checkpoint.verify(tmp_path)] == [(1, False)]
    checkpoint.prune(tmp_path, 1, keep=1)
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize("name", ["state.json", "step", "identity"])
def test_a_manifest_that_leaves_something_out_is_damage(tmp_path, name):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"].pop(name, None)
    manifest.pop(name, None)
    forged = {**manifest, "sha256": files.sha256_of_json(manifest)}
    (path / "manifest.json").write_text(json.dumps(forged))
    assert checkpoint.check(path) == f"manifest.json does not say {name}"


def test_no_pickle_in_a_checkpoint(tmp_path):
    path = save(tmp_path, 1)
    assert sorted(p.suffix for p in path.iterdir()) == [
        ".json",
        ".json",
        ".safetensors",
        ".safetensors",
    ]
    for file in path.glob("*.safetensors"):
        assert file.read_bytes()[8:9] == b"{"
    # One file writes handles of memory in the form that vLLM's own interface asks for, and reads none.
    handles = "transfer_ipc.py"
    for source in Path(alignkit.__file__).parent.rglob("*.py"):
        text = source.read_text().replace(".eval(", "")
        assert not re.search(r"torch\.(load|save)\(|np\.load|joblib|\beval\(", text)
        assert not re.search(r"pickle\.load|Unpickler|from pickle", text)
        assert source.name == handles or "import pickle" not in text


def test_optimizer_round_trip(tmp_path):
    def make():
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(3, 2))
        return w, torch.optim.AdamW(
            [{"params": [w], "weight_decay": 0.1}], lr=0.1, betas=(0.8, 0.99)
        )

    def step(w, optimizer):
        optimizer.zero_grad()
        (w**2).sum().backward()
        optimizer.step()

    w, optimizer = make()
    step(w, optimizer)
    tensors, state = optimizer_state(optimizer)
    checkpoint.save(
        tmp_path, 1, {"optimizer": tensors, "policy": {"w": w}}, json.loads(json.dumps(state)), {}
    )
    step(w, optimizer)

    other, fresh = make()
    found = checkpoint.load(tmp_path / "step-1")
    other.data.copy_(found.tensors["policy"]["w"])
    load_optimizer_state(fresh, found.tensors["optimizer"], found.state)
    step(other, fresh)
    assert torch.equal(w, other)
