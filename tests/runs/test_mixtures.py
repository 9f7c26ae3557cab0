"""`data.train` as a list of sources with shares: what a run learns from, resumed or not."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from world import SHORT_RUN, pair_rows, run, save_model, write_rows

import alignkit
from alignkit.config import load_recipe
from alignkit.data import cache
from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.files import read_jsonl
from alignkit.runs.launch import run_recipe

SETTINGS = {**SHORT_RUN, "steps": 6, "eval_every": 0, "save_every": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    rows = pair_rows(12)
    write_rows(folder / "all.jsonl", rows)
    write_rows(folder / "first.jsonl", rows[:8])
    write_rows(folder / "second.jsonl", rows[8:])
    renamed = [{"question": row.pop("prompt"), **row} for row in pair_rows(12)[8:]]
    write_rows(folder / "renamed.jsonl", renamed)
    parts = {"train": rows[:2], "extra": rows[8:]}
    (folder / "split.json").write_text(json.dumps(parts))
    return folder


def recipe(world, out, train, *overrides):
    settings = [f"train.{name}={value}" for name, value in SETTINGS.items()]
    places = [f"model.name_or_path={world / 'model'}", f"output_dir={out}"]
    return load_recipe("dpo", [f"data.train={train}", *places, *settings, *overrides])


def sources(world, *entries):
    return "[" + ", ".join(f"{{source: {world}/{entry}}}" for entry in entries) + "]"


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_without_shares_two_halves_are_the_whole(world, tmp_path):
    run_recipe(recipe(world, tmp_path / "whole", world / "all.jsonl"))
    halves = sources(world, "first.jsonl", "second.jsonl")
    run_recipe(recipe(world, tmp_path / "halves", halves))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))

    # The split, the cap and the columns are those of the source.
    parts = sources(
        world, "first.jsonl", "renamed.jsonl, columns: {prompt: question}, max_rows: 3",
        "split.json, split: extra",
    )  # fmt: skip
    job_rows = run_recipe(recipe(world, tmp_path / "parts", parts))
    assert job_rows.step == 6
    card = (tmp_path / "parts" / "README.md").read_text()
    assert "renamed.jsonl: 3 rows read, 3 kept" in card
    assert "split.json: 4 rows read, 4 kept" in card


def test_a_resumed_mixture_is_the_run_that_was_not_stopped(world, tmp_path):
    mixture = sources(world, "first.jsonl, share: 1", "second.jsonl, share: 2")
    run_recipe(recipe(world, tmp_path / "whole", mixture))
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "first.jsonl: 4 of 12 rows of an epoch (33.3%), each of its 8 rows 0.50 times" in card
    assert "second.jsonl: 8 of 12 rows of an epoch (66.7%), each of its 4 rows 2.00 times" in card
    metrics = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [row["epoch"] for row in metrics] == [
        pytest.approx(i / 3, abs=1e-3) for i in range(1, 7)
    ]

    run_recipe(recipe(world, tmp_path / "once", sources(world, "first.jsonl", "second.jsonl")))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "once"))

    # The same order on resumption: the second half of the steps from the checkpoint at the third.
    part = tmp_path / "part"
    run_recipe(recipe(world, part, mixture))
    (part / "model").rename(tmp_path / "gone")
    resumed = run_recipe(recipe(world, part, mixture), resume="auto")
    assert resumed.resumed_from == 3
    assert same(weights(tmp_path / "whole"), weights(part))


def test_other_shares_are_another_run(world, tmp_path):
    run_recipe(
        recipe(world, tmp_path, sources(world, "first.jsonl, share: 1", "second.jsonl, share: 1"))
    )
    (tmp_path / "model").rename(tmp_path / "gone")
    other = sources(world, "first.jsonl, share: 1", "second.jsonl, share: 3")
    with pytest.raises(CheckpointError, match="mixture"):
        run_recipe(recipe(world, tmp_path, other), resume="auto")


def test_stored_rows_give_the_run_of_rows_in_memory(world, tmp_path, monkeypatch):
    mixture = sources(world, "first.jsonl, share: 3", "second.jsonl, share: 1")
    run_recipe(recipe(world, tmp_path / "memory", mixture))
    monkeypatch.setattr(cache, "FEW", 5)  # the first source is stored, the second is not
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    run_recipe(recipe(world, tmp_path / "stored", mixture))
    assert any((tmp_path / "cache" / "data").iterdir())
    assert same(weights(tmp_path / "memory"), weights(tmp_path / "stored"))


def test_online_prompts_are_mixed_by_their_shares(world, tmp_path):
    seen = Counter()

    def score(prompts, completions, origin, **columns):
        seen.update(origin)
        return [float(len(text)) for text in completions]

    def rows(origin, n):
        return [{"prompt": f"w{i} w4", "origin": origin} for i in range(n)]

    mixture = [
        {"source": rows("a", 10), "share": 1},
        {"source": rows("b", 2), "share": 3},
        {"source": rows("c", 5), "share": 0},
    ]
    settings = {**SETTINGS, "steps": 3, "save_every": 0}
    alignkit.train(
        alignkit.RLOO(), model=world / "model", data=mixture, rewards=score,
        output_dir=tmp_path, completions=2, max_new_tokens=3, **settings,
    )  # fmt: skip
    assert seen == {"a": 3 * 2, "b": 9 * 2}  # one epoch of 12 prompts, two completions of each


def test_live_rows_are_the_run_of_their_files(world, tmp_path):
    mixture = sources(world, "first.jsonl, share: 1", "second.jsonl, share: 2")
    run_recipe(recipe(world, tmp_path / "files", mixture))
    rows = pair_rows(12)
    live = [{"source": rows[:8], "share": 1}, {"source": world / "second.jsonl", "share": 2}]
    beta = load_recipe("dpo").objective["beta"]
    alignkit.train(
        alignkit.DPO(beta=beta), model=world / "model", data=live, output_dir=tmp_path / "live",
        **SETTINGS,
    )  # fmt: skip
    assert same(weights(tmp_path / "files"), weights(tmp_path / "live"))
    recorded = load_recipe(tmp_path / "live" / "recipe.yaml").data.train
    assert recorded[0].source.startswith("python:rows-")
    with pytest.raises(ConfigError, match="as an object; start the run there"):
        run_recipe(recipe(world, tmp_path / "x", f"[{{source: '{recorded[0].source}'}}]"))


@pytest.mark.parametrize(
    ("entries", "error", "match"),
    [
        (["first.jsonl, share: 0", "second.jsonl, share: 0"], ConfigError, "the shares sum to 0"),
        (["first.jsonl, share: -1"], ConfigError, r"`data.train.0.share` is -1; it should be"),
        (["first.jsonl, share: 1", "second.jsonl"], ConfigError, "second.jsonl has no share"),
        (["first.jsonl, shar: 1"], ConfigError, "Did you mean `share`"),
        (["first.jsonl, max_rows: 0"], ConfigError, "max_rows"),
        (["first.jsonl", "fist.jsonl"], DataError, "no file or folder .*first.jsonl is there"),
        (["split.json, split: test"], DataError, "no split `test`; the splits are train, extra"),
        (["first.jsonl, share: 1", "second.jsonl, share: 1.0e-9"], DataError, "no row of an epoch"),
    ],
)
def test_bad_mixtures_get_a_sentence(world, tmp_path, entries, error, match):
    with pytest.raises(error, match=match) as caught:
        run_recipe(recipe(world, tmp_path / "run", sources(world, *entries)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_shows_and_refuses_mixtures(world, tmp_path, capsys):
    good = f"data.train={sources(world, 'first.jsonl, share: 1', 'second.jsonl, share: 2')}"
    assert run("recipes", "show", "dpo", good) == 0
    assert "share: 2" in capsys.readouterr().out
    bad = f"data.train={sources(world, 'split.json, split: test')}"
    paths = [f"model.name_or_path={world / 'model'}", f"output_dir={tmp_path / 'run'}"]
    assert run("train", "dpo", bad, *paths) == 3
