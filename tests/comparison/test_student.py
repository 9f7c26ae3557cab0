"""A student proposes the pairs of `alignkit iterate`, the rewards label them, and the student learns
the labels (TS-Align).
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from world import run, save_model, save_reward_model, write_rows

from alignkit.errors import ConfigError
from alignkit.policies.reward_head import FILE
from alignkit.rewards import load_reward_model
from alignkit.rollout.text import decode_after
from alignkit.runs.pairs import PairRequest, make_pairs
from alignkit.runs.sampled_answers import sample_answers

RECIPE = """\
model: {name_or_path: model}
data: {train: prompts.jsonl}
objective: {name: dpo, beta: 0.5}
rewards: [{model: student}]
train: {steps: 3, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2, save_every: 0, log_samples_every: 0}
rollout: {max_new_tokens: 4}
iterate: {rounds: 2, prompts: prompts.jsonl, samples: 2, pairs: {samples: 5}}
"""
STUDENT = "iterate.pairs.student.model=student"
REFITTED = (
    "iterate.pairs.student.train={steps: 4, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2, "
    "eval_every: 0, save_every: 0}"
)
OF_THE_STUDENT = "train={steps: 4, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2, eval_every: 0, save_every: 0}"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    save_reward_model(tmp_path / "student", tmp_path / "model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(3, 9)])
    Path("mine.yaml").write_text(RECIPE)
    # A teacher that counts what it is asked, and holds the opposite of the student.
    Path("teacher.py").write_text(
        "from alignkit.rewards import load_reward_model\n\n\n"
        "def opposite(prompts, completions, **_):\n"
        "    open('asked.txt', 'a').write('.' * len(completions))\n"
        "    return [-score for score in load_reward_model('student')(prompts, completions)]\n"
    )
    return tmp_path


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def texts(file):
    return [[row[name] for name in ("prompt", "chosen", "rejected")] for row in rows(file)]


def weights(folder):
    return Path(folder, "model", "model.safetensors").read_bytes()


def test_a_teacher_that_is_the_student_changes_nothing(world):
    """Its best against its worst, labelled by itself, is the method best_worst: the same pairs and
    the same models in both rounds.
    """
    plain = ["iterate.pairs.method=best_worst", "output_dir=plain"]
    assert run("iterate", "mine.yaml", *plain) in (0, None)
    own = ["iterate.pairs.label_temperature=0", STUDENT, "output_dir=own"]
    assert run("iterate", "mine.yaml", *own) in (0, None)

    for number in (1, 2):
        file = f"pairs/round-{number}.jsonl"
        assert texts(f"own/{file}") == texts(f"plain/{file}")
        assert weights(f"own/round-{number}") == weights(f"plain/round-{number}")
    assert not Path("own/student-1").exists()


def test_the_labels_are_the_teachers(world):
    """The student's best against its worst, second best against second worst; the teacher is asked
    about these alone, and here it holds the opposite.
    """
    request = PairRequest(
        "model",
        "prompts.jsonl",
        "teacher.py:opposite",
        samples=5,
        pairs=2,
        label_temperature=0.0,
        max_new_tokens=4,
        student="student",
    )
    counts = make_pairs(request, world / "pairs.jsonl")

    answers = sample_answers(request)
    student = load_reward_model("student")
    wanted = []
    for prompt, samples in zip(answers.prompts, answers.samples):
        said = [decode_after(answers.tokenizer, prompt.ids, sample.ids) for sample in samples]
        said = [text for text in said if text.strip()]
        said.sort(key=dict(zip(said, student([prompt.text] * len(said), said))).__getitem__)
        ends = [(said[k], said[-1 - k]) for k in range(len(said) // 2)]
        wanted += [[prompt.text, low, high] for low, high in ends if low != high][:2]
    assert sorted(texts("pairs.jsonl")) == sorted(wanted)
    assert counts["pairs labelled against the student"] == counts["pairs written"] > 6
    assert Path("asked.txt").read_text() == "." * counts["completions scored"]
    assert counts["completions scored"] == 2 * len(wanted) < counts["completions"]


def test_the_student_learns_the_labels_of_each_round(world, capsys):
    """Its run is that of `reward_model` on the round's pairs, and what it becomes proposes the next."""
    labels = ["rewards=[{function: 'teacher.py:opposite'}]", "iterate.pairs.label_temperature=0"]
    common = [*labels, STUDENT, REFITTED, "output_dir=out"]
    assert run("iterate", "mine.yaml", *common) in (0, None)

    by_hand = ["model.name_or_path=student", "data={train: out/pairs/round-1.jsonl, eval: null}"]
    settings = [*by_hand, OF_THE_STUDENT, "output_dir=by_hand"]
    assert run("train", "reward_model", *settings) in (0, None)
    assert weights("by_hand") == weights("out/student-1")

    # Pairs of a second round with the student of the first, and with the one that it began with.
    asked = ["out/round-1/model", "prompts.jsonl", "--reward", "teacher.py:opposite"]
    asked += ["--samples", 5, "--label-temperature", 0, "--max-new-tokens", 4, "--seed", 1000]
    learnt = ["--student", "out/student-1/model", "--to", "learnt.jsonl"]
    assert run("pairs", *asked, *learnt) in (0, None)
    assert run("pairs", *asked, "--student", "student", "--to", "first.jsonl") in (0, None)
    assert texts("out/pairs/round-2.jsonl") == texts("learnt.jsonl") != texts("first.jsonl")

    # It begins with what it was, head and all, and goes on from where the round before left it.
    head = {name: load_file(f"{name}/model.safetensors")["score.weight"] for name in ("student",)}
    moved = load_file("out/student-1/model/model.safetensors")["score.weight"] - head["student"]
    assert (
        0 < moved.abs().max() < 0.06
    )  # four steps of AdamW with this rate, and a fresh head is farther

    capsys.readouterr()
    assert run("iterate", "mine.yaml", *common) in (0, None)
    assert "student-2 is finished and not repeated" in capsys.readouterr().err
    assert run("iterate", "mine.yaml", *labels, STUDENT, "output_dir=out") == 2
    assert "iterate.pairs.student.model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([STUDENT, "iterate.pairs.method=best_worst"], "the method best_worst would choose them"),
        (["iterate.pairs.student.model=./none"], "there is no folder ./none"),
        (["iterate.pairs.student.model=model"], "student.model: model is a language model, and no"),
        (["rewards=[{model: model}]"], "rewards.0.model: model is a language model, and no reward"),
        (["rewards=[{rewriter: ./none, ask: better}]"], "rewards.0.rewriter: there is no folder"),
        ([STUDENT, "iterate.pairs.student.train={steps: null}"], "are both null"),
        ([STUDENT, "iterate.pairs.student.train={stepz: 1}"], "stepz"),
        (["iterate.pairs.student.train={steps: 1}"], "iterate.pairs.student.model"),
    ],
)
def test_what_is_refused(world, capsys, changes, words):
    assert run("iterate", "mine.yaml", "output_dir=out", *changes) in (2, 4)
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_heads_that_training_would_leave_behind(world, capsys):
    """A language model with a reward head beside it would be trained under a fresh head."""
    save_file(load_file("student/model.safetensors"), str(world / "model" / FILE))
    changes = ["iterate.pairs.student.model=model", REFITTED, "output_dir=out"]
    assert run("iterate", "mine.yaml", *changes) == 2
    assert "cannot be trained on" in capsys.readouterr().err

    with pytest.raises(ConfigError, match="--active would choose them otherwise"):
        PairRequest("model", "prompts.jsonl", active=("a", "b"), student="student")
