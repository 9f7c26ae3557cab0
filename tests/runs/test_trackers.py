"""Trackers get what metrics.jsonl gets: each is really run where its package is installed."""

import json
from importlib.util import find_spec

import pytest
from wandb_file import finished_records
from world import pair_rows, run, save_model, write_rows

from alignkit.files import read_jsonl


def train(folder, tracker):
    save_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(8))
    code = run(
        *("train", "dpo", f"model.name_or_path={folder / 'model'}"),
        *(f"data.train={folder / 'pairs.jsonl'}", f"output_dir={folder / 'run'}"),
        *("train.steps=2", "train.batch_size=4", "train.log_samples_every=0"),
        f"trackers=[{tracker}]",
    )
    assert code == 0
    return [row for row in read_jsonl(folder / "run" / "metrics.jsonl") if "loss" in row]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(tmp_path, "tensorboard")
    events = [p for p in (tmp_path / "run").rglob("events.out.tfevents*") if p.stat().st_size]
    logged = {}
    for file in events:
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        for name in accumulator.Tags()["scalars"]:
            logged[name] = [(e.step, e.value) for e in accumulator.Scalars(name)]
    assert logged["loss"] == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert "rewards/margins" in logged


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = train(tmp_path, "wandb")

    (file,) = tmp_path.rglob("run-*.wandb")
    logged = []
    config = {}
    for record in finished_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            names = (item.key or ".".join(item.nested_key) for item in items)
            logged.append(dict(zip(names, (json.loads(item.value_json) for item in items))))
        update = record.run.config.update if kind == "run" else record.config.update
        config |= {item.key or item.nested_key[0]: item.value_json for item in update}
    assert [row["loss"] for row in logged] == [pytest.approx(row["loss"]) for row in rows]
    assert [row["_step"] for row in logged] == [row["step"] for row in rows]
    assert "rewards/margins" in logged[0]
    assert any("name_or_path" in name for name in config)  # the recipe is the run's config


def test_trackio(tmp_path, monkeypatch):
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    rows = train(tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").glob("run.db")
    with sqlite3.connect(file) as database:
        logged = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics")]
    assert [row["loss"] for row in logged] == [pytest.approx(row["loss"]) for row in rows]
