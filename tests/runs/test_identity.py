"""What a run is: replaced weights, rows, code and recipes are noticed, and so are damaged files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import pair_rows, run, save_model, write_rows

from alignkit.errors import CheckpointError, ModelError
from alignkit.files import MANIFEST, read_jsonl, read_manifest, write_manifest
from alignkit.policies.folding import merge
from alignkit.runs.trained_model import load_finished

SETTINGS = [
    "train.steps=2",
    "train.batch_size=4",
    "train.eval_every=0",
    "train.log_samples_every=0",
    "rollout.completions=2",
    "rollout.max_new_tokens=4",
]
REWARD = "def score(prompts, completions, answer, **columns):\n    return [float(len(c)) for c in completions]\n"


@pytest.fixture
def world(tmp_path):
    save_model(tmp_path / "base")
    save_model(tmp_path / "other", seed=1)
    write_rows(tmp_path / "pairs.jsonl", pair_rows(8))
    prompts(tmp_path, "yes")
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path


def prompts(world, answer):
    rows = [{"prompt": row["prompt"], "answer": answer} for row in pair_rows(8)]
    write_rows(world / "prompts.jsonl", rows)


def train(world, recipe, *overrides, resume=True):
    rows = "pairs" if recipe == "dpo" else "prompts"
    reward = f"rewards=[{{function: '{world / 'mine.py'}:score'}}]"
    return run(
        "train",
        recipe,
        f"model.name_or_path={world / 'base'}",
        f"data.train={world / rows}.jsonl",
        f"output_dir={world / 'run'}",
        *([reward] if recipe == "rpg" else []),
        *SETTINGS,
        *overrides,
        *(["--resume", "auto"] if resume else []),
    )


def replace_weights(folder, key="model.norm.weight"):
    """One number of one tensor: same shapes, same tokenizer."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[key][0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})


def unfinish(world):
    shutil.move(world / "run" / "model", world / "finished")


@pytest.mark.parametrize("kind", ["full", "lora", "reference", "rpg"])
def test_replaced_weights_are_refused(world, capsys, kind):
    recipe = "rpg" if kind == "rpg" else "dpo"
    more = {"lora": ["model.adapter.r=2"], "reference": [f"reference.kind={world / 'other'}"]}
    overrides = more.get(kind, [])
    assert train(world, recipe, *overrides) == 0
    unfinish(world)
    replace_weights(world / ("other" if kind == "reference" else "base"))

    assert train(world, recipe, *overrides) == 6
    name = "reference" if kind == "reference" else "model"
    assert f"weights.{name}: " in capsys.readouterr().err
    assert not (world / "run" / "model").exists()


def test_a_checkpoint_of_an_earlier_version_is_resumed(world, capsys):
    assert train(world, "dpo") == 0
    unfinish(world)
    (step,) = (world / "run" / "checkpoints").iterdir()
    content = read_manifest(step)
    del content["identity"]["weights"], content["identity"]["code"]
    for key in ("files", "format", "sha256"):
        del content[key]
    write_manifest(step, content)
    replace_weights(world / "base")

    assert train(world, "dpo") == 0
    assert "does not say whether the weights of the models have changed" in capsys.readouterr().err


def test_a_finished_run_is_compared_too(world, capsys):
    assert train(world, "dpo", resume=False) == 0
    before = (world / "run" / "model" / "model.safetensors").read_bytes()
    for override, words in {
        "objective={name: ipo}": "objective.name: dpo -> ipo",
        "objective.beta=0.7": " -> 0.7",
        "train.steps=1": "train.steps: 2 -> 1",
    }.items():
        capsys.readouterr()
        assert train(world, "dpo", override) == 6
        assert words in capsys.readouterr().err
    assert (world / "run" / "model" / "model.safetensors").read_bytes() == before

    assert train(world, "dpo") == 0
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_more_steps_go_on_training(world, capsys):
    """With a constant rate the schedule's end changes nothing: bit for bit the long run."""
    constant = ["train.schedule=constant", "train.warmup_steps=0"]
    assert train(world, "dpo", *constant, "train.steps=4", resume=False) == 0
    expected = (world / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(world / "run")

    assert train(world, "dpo", *constant, resume=False) == 0
    capsys.readouterr()
    assert train(world, "dpo", *constant, "train.steps=4") == 0
    shown = capsys.readouterr().err
    assert "train.steps: 2 -> 4" in shown
    assert "now ends at step 4, from step-2 on" in shown
    assert [row["step"] for row in read_jsonl(world / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (world / "run" / "model" / "model.safetensors").read_bytes() == expected
    assert train(world, "dpo", *constant, "train.steps=4") == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["answer", "code"])
def test_what_rewards_see_is_part_of_the_run(world, capsys, what):
    assert train(world, "rpg") == 0
    unfinish(world)
    if what == "answer":
        prompts(world, "no")
    else:
        (world / "mine.py").write_text(REWARD.replace("float(len(c))", "-float(len(c))"))
    assert train(world, "rpg") == 6
    name = "prompts: " if what == "answer" else "code.rewards.0.function: "
    assert name in capsys.readouterr().err


def flip(file, place=-3):
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_damaged_files_of_a_model_are_named(world, capsys):
    store = f"reference.store={world / 'store'}"
    assert train(world, "dpo", store) == 0
    folder = world / "run" / "model"
    (folder / "README.md").write_text("A card that somebody wrote.")
    load_finished(str(world / "run"))
    assert run("checkpoint", "verify", world / "run") == 0

    file = folder / "model.safetensors"
    flip(file)
    capsys.readouterr()
    assert run("generate", world / "run", "w3") == 4
    assert "model.safetensors does not match its SHA-256" in capsys.readouterr().err
    assert run("checkpoint", "verify", world / "run") == 6
    assert "model.safetensors does not match its SHA-256" in capsys.readouterr().out
    assert train(world, "dpo", store) == 6  # it is not "finished; nothing to do"

    (folder / MANIFEST).unlink()  # as a model of an earlier version, or from elsewhere
    load_finished(str(world / "run"))

    (stored,) = (world / "store").glob("*.safetensors")
    flip(stored)
    assert run("checkpoint", "verify", world / "run") == 6
    assert stored.name in capsys.readouterr().out
    shutil.rmtree(world / "run")
    assert train(world, "dpo", store) == 6
    assert f"{stored} is damaged" in capsys.readouterr().err


def test_an_adapter_and_its_base(world, monkeypatch, capsys):
    """Found from everywhere and after a move; refused on a base that was replaced."""
    monkeypatch.chdir(world)
    assert train(world, "dpo", "model.name_or_path=./base", "model.adapter.r=2") == 0
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    load_finished(str(world / "run"))

    moved = world / "elsewhere" / "moved"
    moved.mkdir()
    shutil.move(world / "base", moved / "base")
    shutil.move(world / "run", moved / "run")
    load_finished(str(moved / "run"))

    half = moved / "run" / ".tmp-merged"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half, of a killed attempt")
    assert run("merge", moved / "run") == 0
    load_finished(str(moved / "run" / "merged"))
    assert not half.exists()

    replace_weights(moved / "base")
    with pytest.raises(CheckpointError, match="weights have been replaced"):
        merge(moved / "run", moved / "again")
    with pytest.raises(CheckpointError, match="weights have been replaced"):
        load_finished(str(moved / "run"))
    assert not (moved / "again").exists()

    flip(moved / "run" / "model" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors does not match"):
        merge(moved / "run", moved / "again")


def in_bfloat16(folder):
    weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ([], torch.bfloat16),
        (["model.save_dtype=float32"], torch.float32),
        (["model.adapter.r=2"], torch.bfloat16),
    ],
    ids=["base", "chosen", "merged"],
)
def test_a_model_is_saved_in_the_dtype_of_its_base(world, overrides, dtype):
    in_bfloat16(world / "base")
    assert train(world, "dpo", *overrides) == 0
    folder = world / "run" / "model"
    if "model.adapter.r=2" in overrides:
        assert run("merge", world / "run") == 0
        folder = world / "run" / "merged"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {dtype}
    assert f'"dtype": "{str(dtype).removeprefix("torch.")}"' in (folder / "config.json").read_text()
    assert load_finished(str(folder)).network.dtype == torch.float32
