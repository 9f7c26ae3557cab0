"""A recipe with a teacher: what is refused before anything is loaded, and runs of every kind."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from world import pad_vocabulary, pair_rows, save_model, write_rows

from alignkit.config import load_recipe
from alignkit.errors import ConfigError, ModelError, ResourceError
from alignkit.files import read_jsonl
from alignkit.runs.launch import run_recipe
from alignkit.runs.resume import identity_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "student")
    save_model(folder / "teacher", seed=1)
    rows = [{"prompt": r["prompt"], "completion": " " + r["chosen"]} for r in pair_rows(10)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "held_out.jsonl", [{"prompt": "w9", "completion": " w10 w11"}])
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    (folder / "worth.py").write_text(
        "def worth(completions, **_):\n    return [float('w5' in text) for text in completions]\n"
    )
    return folder


def recipe(world, out, *overrides, rows="rows.jsonl"):
    settings = [
        "train.steps=3",
        "train.batch_size=4",
        "train.save_every=0",
        "train.log_samples_every=0",
        "rollout.max_new_tokens=4",
        "rollout.completions=2",
        f"model.name_or_path={world / 'student'}",
        f"teacher.name_or_path={world / 'teacher'}",
        f"data.train={world / rows}",
        f"output_dir={out}",
    ]
    return load_recipe("distill", [*settings, *overrides])


@pytest.mark.parametrize(
    ("rows", "overrides"),
    [
        ("rows.jsonl", ["objective.share=0", "objective.kd_ratio=0.5"]),
        ("rows.jsonl", ["objective.share=0", "teacher.top=5", "objective.divergence=jsd"]),
        ("rows.jsonl", ["objective.share=0.5", "objective.divergence=jsd"]),
        ("prompts.jsonl", ["objective.share=1"]),
    ],
)
def test_given_own_and_mixed_answers_train(world, tmp_path, rows, overrides):
    run_recipe(recipe(world, tmp_path / "run", *overrides, rows=rows))
    written = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(written) == 3
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in written)
    assert ("rollout/own_share" in written[0]) == ("objective.share=0.5" in overrides)


@pytest.fixture(scope="module")
def padded_world(world, tmp_path_factory):
    """Students and teachers with the same weights, padded and not, and an adapter on each teacher."""
    folder = tmp_path_factory.mktemp("padded")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    for name in ("student", "teacher"):
        shutil.copytree(folder / name, folder / f"{name}-padded")
        pad_vocabulary(folder / name, 0)
        pad_vocabulary(folder / f"{name}-padded", 9)

    for name in ("teacher", "teacher-padded"):
        torch.manual_seed(11)
        base = AutoModelForCausalLM.from_pretrained(folder / name)
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, settings).save_pretrained(folder / f"{name}-adapter")
    return folder


REPLAY = ["objective.share=0.5", "objective.share_growth=0.3", "objective.replay=4"]
REPLAY += ["train.eval_every=1", "objective.share_tolerance=0"]
OPTIONS = {
    "replayed": (REPLAY, "rows.jsonl", ""),
    "proposed": (["objective.share=1", "objective.teacher_top=3"], "prompts.jsonl", ""),
    "replayed proposals": ([*REPLAY, "objective.teacher_top=3"], "rows.jsonl", ""),
    "stored": (["objective.share=0", "teacher.top=5", "teacher.store=STORE"], "rows.jsonl", ""),
    "adapter": (["objective.share=0.5"], "rows.jsonl", "-adapter"),
    "stored adapter": (["objective.share=0", "teacher.top=5"], "rows.jsonl", "-adapter"),
    "kdrl": (["objective={name: kdrl, kd_weight: 0.1}"], "prompts.jsonl", ""),
    "minillm": (["objective={name: minillm}"], "prompts.jsonl", ""),
    "opd": (["objective={name: opd}"], "prompts.jsonl", ""),
}


LONG = [pytest.param(name, marks=pytest.mark.long) for name in OPTIONS if name != "proposed"]


@pytest.mark.parametrize("option", ["proposed", *LONG])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_padding_of_one_embedding_changes_nothing(padded_world, tmp_path, option, which):
    """The losses are those of the same models without padding."""
    overrides, rows, kind = OPTIONS[option]
    losses = []
    for pad in ("", "-padded"):
        names = {"teacher": "teacher", "student": "student"} | {which: f"{which}{pad}"}
        given = [text.replace("STORE", str(tmp_path / f"store{pad}")) for text in overrides]
        given += (
            [f"data.eval={padded_world / 'held_out.jsonl'}"]
            if "train.eval_every=1" in given
            else []
        )
        given += ["rewards=[{function: " + f"{padded_world}/worth.py:worth" + "}]"]
        given += [f"model.name_or_path={padded_world / names['student']}"]
        given += [f"teacher.name_or_path={padded_world / (names['teacher'] + kind)}"]
        given.append("data.max_length=32")
        run_recipe(recipe(padded_world, tmp_path / f"run{pad}", *given, rows=rows))
        losses.append([row["loss"] for row in read_jsonl(tmp_path / f"run{pad}" / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(set(losses[0])) == 3


def test_what_a_recipe_cannot_ask_for(world, tmp_path):
    fixed = "objective.share=0"
    for overrides, message in (
        (["teacher=null", fixed], "this objective learns from a teacher; set teacher.name_or_path"),
        (["teacher.store=x", fixed], "say how many with `top`"),
        (["teacher.top=0", fixed], "teacher.top"),
        (["teacher.top=3", "objective.share=0.5"], "this objective samples new ones"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            run_recipe(recipe(world, tmp_path / "run", *overrides))
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"teacher.name_or_path: there is no folder"):
        run_recipe(recipe(world, tmp_path / "run", "teacher.name_or_path=/no/where", fixed))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_nothing_uses_is_reported(world, tmp_path, capsys):
    run_recipe(recipe(world, tmp_path / "run", "objective={name: sft}"))
    said = capsys.readouterr()
    assert (
        "`teacher` is set in the recipe, but this objective does not use it" in said.out + said.err
    )


def test_checkpoints_from_before_there_were_teachers_still_fit(world, tmp_path):
    assert "teacher" in identity_of(recipe(world, tmp_path / "run"))
    assert "teacher" not in identity_of(recipe(world, tmp_path / "run", "teacher=null"))
    stored = recipe(world, tmp_path / "run", "teacher.top=2", "teacher.store=a")
    moved = recipe(world, tmp_path / "run", "teacher.top=2", "teacher.store=b")
    assert identity_of(stored) == identity_of(moved)


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory):
    """A finished run that filled a store, and the folder of its teacher, gone since."""
    world = tmp_path_factory.mktemp("stored")
    save_model(world / "student")
    save_model(world / "teacher", seed=1)
    rows = [{"prompt": r["prompt"], "completion": " " + r["chosen"]} for r in pair_rows(10)]
    write_rows(world / "rows.jsonl", rows[:8])
    write_rows(world / "held.jsonl", rows[8:])
    run_recipe(recipe(world, world / "first", *stored_in(world)))
    (world / "teacher").rename(world / "elsewhere")
    return world


def stored_in(world):
    return [
        "objective.share=0",
        "teacher.top=5",
        f"teacher.store={world / 'store'}",
        f"data.eval={world / 'held.jsonl'}",
        "train.save_every=1",
    ]


def identity_in(run):
    manifest = sorted(run.glob("checkpoints/*/manifest.json"))[-1]
    return json.loads(manifest.read_text())["identity"]


def test_a_filled_store_needs_no_teacher(stored_run, capsys):
    world = stored_run
    job = run_recipe(recipe(world, world / "second", *stored_in(world)))
    assert job is not None
    first, second = (
        [row["loss"] for row in read_jsonl(world / name / "metrics.jsonl") if "loss" in row]
        for name in ("first", "second")
    )
    assert len(first) >= 3
    assert first == second
    hashes = [identity_in(world / name)["weights"]["teacher"] for name in ("first", "second")]
    assert hashes[0] == hashes[1]

    # It goes on from a checkpoint without the teacher too.
    longer = recipe(world, world / "second", *stored_in(world), "train.steps=4")
    run_recipe(longer, resume="auto")
    capsys.readouterr()


def test_rows_that_no_store_has_need_the_teacher(stored_run, tmp_path):
    world = stored_run
    more = [{"prompt": "a b c", "completion": " d"}]
    write_rows(tmp_path / "more.jsonl", more * 8)
    with pytest.raises(ModelError, match=r"does not have all rows of this run.*no folder") as error:
        run_recipe(
            recipe(
                world, tmp_path / "run", *stored_in(world), f"data.train={tmp_path / 'more.jsonl'}"
            )
        )
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)

    # Another `top`, or another teacher of that name, is nothing that the store knows.
    with pytest.raises(ModelError, match="there is no folder"):
        run_recipe(recipe(world, tmp_path / "run", *stored_in(world), "teacher.top=4"))
    save_model(world / "teacher", seed=2)
    try:
        run_recipe(recipe(world, tmp_path / "other", *stored_in(world)))
        assert len(list((world / "store").glob("*.safetensors"))) == 2
    finally:
        shutil.rmtree(world / "teacher")
    with pytest.raises(ResourceError, match=r"laws of two teachers .* delete one"):
        run_recipe(recipe(world, tmp_path / "run", *stored_in(world)))
