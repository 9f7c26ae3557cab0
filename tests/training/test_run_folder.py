"""The folder of a run: whose files are overwritten, who may write, and what damaged logs cost."""

import json
import shutil

import pytest
from world import make_job, pair_rows, pairs, run, save_model, write_rows

from alignkit.errors import ConfigError, ResourceError
from alignkit.files import read_jsonl
from alignkit.objectives.preference.dpo import DPO
from alignkit.training import checkpoint
from alignkit.training.loop import train
from alignkit.training.run_folder import RunFolder

SETTINGS = [
    "train.steps=2",
    "train.batch_size=4",
    "train.save_every=1",
    "train.eval_every=0",
    "train.log_samples_every=0",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(8))
    return folder


def command(world, out, *more):
    paths = [f"model.name_or_path={world / 'model'}", f"data.train={world / 'pairs.jsonl'}"]
    return ["train", "dpo", *paths, *SETTINGS, f"output_dir={out}", *more]


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# What stands in somebody's project folder, each alone enough to refuse it.
OWN_FILES = {
    "README.md": "# My project",
    "recipe.yaml": "train: {steps: 2}",
    "samples.jsonl": '{"prompt": "mine"}\n',
    "metrics.jsonl": '{"step": 1}\n',
    "model/config.json": "{}",
    "train.py": "print('mine')",
    "data/rows.jsonl": "{}",
}


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]], ids=["new", "resumed"])
@pytest.mark.parametrize("name", OWN_FILES)
def test_files_that_no_run_has_written_are_left_alone(
    world, tmp_path, monkeypatch, capsys, name, resume
):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(OWN_FILES[name])
    before = contents(tmp_path)

    monkeypatch.chdir(tmp_path)
    assert run(*command(world, ".", *resume)) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_logs_and_hidden_files_are_in_nobodys_way(world, tmp_path):
    """A scheduler writes its log before the run begins, and a comparison its own file."""
    before = dict.fromkeys(("log.txt", "slurm-7.out", "outcome.json", ".gitignore"), "mine")
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    assert run(*command(world, tmp_path)) == 0
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_a_file_in_the_place_of_the_folder_is_refused(world, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert run(*command(world, tmp_path / "run")) == 2
    assert "run is a file; choose an empty or new folder" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_a_run_wrote_before_its_mark_is_its_own(world, tmp_path):
    """The reference's log-probs are stored before the first step."""
    out = tmp_path / "run"
    assert run(*command(world, out, f"reference.store={out / 'store'}")) == 0
    assert (out / "store").exists()

    # A run that was killed in between has left nothing else.
    for left in [path for path in out.iterdir() if path.name != "store"]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert run(*command(world, out, f"reference.store={out / 'store'}", "--resume", "auto")) == 0


@pytest.mark.parametrize("left", ["checkpoints", "logs"])
def test_the_folder_of_an_older_run_is_known(world, tmp_path, left):
    """Versions before this one wrote no mark."""
    out = tmp_path / "run"
    assert run(*command(world, out)) == 0
    (out / ".run.json").unlink()
    shutil.rmtree(out / "model")
    if left == "checkpoints":
        (out / "recipe.yaml").unlink()
    else:
        shutil.rmtree(out / "checkpoints")
    assert run(*command(world, out, "--resume", "auto")) == 0
    assert len(read_jsonl(out / "metrics.jsonl")) == 2


def stop_after(model, out, steps):
    """A run of six steps that was stopped after some, as if its process had been killed."""
    job = make_job(model, out, DPO(), pairs(8), save_every=1)
    short = job.run.log

    def log(row):
        short(row)
        if row["step"] == steps:
            raise KeyboardInterrupt

    job.run.log = log
    with pytest.raises(KeyboardInterrupt), job.run:
        train(job)


def go_on(model, out):
    job = make_job(model, out, DPO(), pairs(8), save_every=1)
    with job.run:
        return train(job, "auto")


def test_lines_that_cannot_be_read_are_left_out_and_counted(world, tmp_path, capsys):
    stop_after(world / "model", tmp_path, 4)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [
        b'{"step": 2, "lo\n',
        b"\xff\xfe\x00\n",
        b'{"loss": 1.0}\n',
        b"[1]\n",
        b'{"step": "x"}\n',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], *bad, *lines[1:]]))

    go_on(world / "model", tmp_path)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "metrics.jsonl: 5 lines could not be read" in capsys.readouterr().err


@pytest.mark.parametrize("tail", [b"", b'{"step": 9', b'{"loss": 1}\n', b"\xff\n"])
def test_the_last_step_is_the_last_that_can_be_read(tmp_path, tail):
    folder = RunFolder(tmp_path)
    assert folder.last_step() == 0
    rows = [json.dumps({"step": step, "filler": "x" * 1000}) for step in range(1, 3001)]
    folder.metrics_file.write_bytes("\n".join(rows).encode() + b"\n" + tail)
    assert folder.last_step() == 3000


def test_a_lock_file_that_is_deleted_admits_nobody(tmp_path):
    with RunFolder(tmp_path):
        for file in tmp_path.iterdir():
            file.unlink()
        with pytest.raises(ResourceError, match="in use by another run"), RunFolder(tmp_path):
            pass
    with RunFolder(tmp_path):
        pass


PLANTED = [
    ".recipe.yaml.tmp",
    ".metrics.jsonl.tmp",
    "..run.json.tmp",
    "README.md",
    "recipe.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "model",
    "checkpoints",
    ".tmp-model",
    ".tmp-model-old",
    "checkpoints/.tmp-step-1",
    "checkpoints/.best.json.tmp",
]


@pytest.mark.parametrize("name", PLANTED)
def test_links_are_refused(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    for step in (1, 2, 3):
        checkpoint.save(elsewhere / "checkpoints", step, {}, {}, {})
    (elsewhere / "file").write_text("mine")

    out = tmp_path / "run"
    place = out / name
    place.parent.mkdir(parents=True)
    is_folder = name in ("model", "checkpoints") or ".tmp-" in name
    target = elsewhere / ("checkpoints" if is_folder else "file")
    place.symlink_to(target, target_is_directory=is_folder)

    before = contents(elsewhere)
    with pytest.raises(ResourceError, match="symbolic link"), RunFolder(out):
        pass
    assert contents(elsewhere) == before
    assert place.is_symlink()


def test_a_link_that_comes_during_a_run_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("")
    with RunFolder(tmp_path / "run") as folder:
        folder.metrics_file.symlink_to(tmp_path / "mine")
        with pytest.raises(ResourceError, match="cannot write"):
            folder.log({"step": 1})
        (folder.path / ".recipe.yaml.tmp").symlink_to(tmp_path / "mine")
        with pytest.raises(ResourceError, match="cannot write"):
            folder.start("train: {}", 0)
    assert (tmp_path / "mine").read_text() == ""


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "README.md").mkdir()
    with RunFolder(tmp_path) as folder, pytest.raises(ConfigError, match=r"README\.md"):
        folder.find("auto", {}, 1)
