"""`alignkit iterate`: the rounds end where the closed form says, an interrupted one goes on bit for bit,
and what cannot be iterated is refused.
"""

import json
from math import log
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from world import run, save_model, write_inputs, write_rows

from alignkit.cli.iterate import in_full
from alignkit.comparison.iterate import iterate, rounds_of
from alignkit.config.iterate import IterateConfig, RoundPairsConfig
from alignkit.config.recipe import load_recipe
from alignkit.tasks import resolve
from alignkit.training.run_folder import RunFolder

ANSWERS = ("w5", "w6", "w7")
REWARDS = torch.tensor([0.0, log(3), 2 * log(3)], dtype=torch.float64)
PROMPT = [10, 4]  # w10 w4

MADE = """\
model: {name_or_path: model}
data: {train: prompts.jsonl}
objective: {name: dpo, beta: 0.5}
rewards: [{function: "worth.py:worth"}]
train: {steps: 4, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2, save_every: 2, log_samples_every: 0}
rollout: {max_new_tokens: 4}
iterate: {rounds: 2, prompts: prompts.jsonl, samples: 2, pairs: {samples: 3, label_temperature: 0}}
"""


def exact_pairs():
    """Pairs in the shares that Bradley-Terry gives them: sigmoid(log 3) = 3/4, sigmoid(2 log 3) = 9/10."""
    rows = []
    for better, worse, wins in ((1, 0, 3), (2, 1, 3), (2, 0, 9)):
        for first, second, count in ((better, worse, wins), (worse, better, 1)):
            chosen, rejected = ANSWERS[first], ANSWERS[second]
            row = {"prompt": "w10 w4", "chosen": f" {chosen}", "rejected": f" {rejected}"}
            rows += [row] * count
    return rows


def logps(folder):
    """Log-probs of the three answers with their end, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    values = []
    for answer in ANSWERS:
        ids = torch.tensor([[*PROMPT, int(answer[1:]), 2]])
        with torch.no_grad():
            laws = model(ids).logits.log_softmax(-1)
        values.append(laws[0, -3, ids[0, -2]] + laws[0, -2, 2])
    return torch.stack(values)


@pytest.mark.parametrize("reference", ["previous", pytest.param("first", marks=pytest.mark.long)])
def test_where_the_rounds_end(tmp_path, monkeypatch, reference):
    """Against the previous model log pi_K - log ref = K r / beta + c, against the first r / beta + c:
    the exact pairs of all three answers leave no other optimum.
    """
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", exact_pairs())
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w10 w4"}])
    beta = 2.0
    code = run(
        "iterate",
        "dpo",
        "rounds=2",
        f"iterate.reference={reference}",
        "iterate.prompts=prompts.jsonl",
        "iterate.samples=2",
        "model.name_or_path=model",
        "data.train=pairs.jsonl",
        f"objective.beta={beta}",
        "train={steps: 100, batch_size: 18, learning_rate: 5.0e-3, warmup_steps: 5, max_grad_norm: 0, save_every: 0, "
        "eval_every: 0, log_samples_every: 0}",
        "rollout.max_new_tokens=3",
        "output_dir=out",
    )
    assert code in (0, None)
    start = logps("model")
    for number in (1, 2):
        moved = logps(f"out/round-{number}/model") - start
        times = number if reference == "previous" else 1
        wanted = times * REWARDS / beta
        torch.testing.assert_close(moved - moved[0], wanted, atol=2e-3, rtol=0)


def inputs(folder):
    write_inputs(folder)
    (folder / "mine.yaml").write_text(MADE)


def weights(folder):
    return Path(folder, "model", "model.safetensors").read_bytes()


def test_a_killed_iteration_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path)
    assert run("iterate", "mine.yaml", "output_dir=whole") in (0, None)

    # Dies after step 3 of the second round, one after its checkpoint.
    real = RunFolder.log

    def log_row(self, row):
        if self.path.name == "round-2" and row.get("step") == 3:
            raise RuntimeError("the power is gone")
        return real(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "log", log_row)
        recipe = load_recipe("mine.yaml", ["output_dir=cut"])
        with pytest.raises(RuntimeError, match="the power is gone"):
            iterate(recipe)
    assert not Path("cut/round-2/model").exists()
    finished = {file: file.stat().st_mtime_ns for file in Path("cut/round-1").rglob("*")}
    pairs = Path("cut/pairs/round-2.jsonl").read_bytes()

    capsys.readouterr()
    assert run("iterate", "mine.yaml", "output_dir=cut") in (0, None)
    assert "round-1 is finished and not repeated" in capsys.readouterr().err
    for name in ("round-1", "round-2"):
        assert weights(f"cut/{name}") == weights(f"whole/{name}")
    assert Path("cut/pairs/round-2.jsonl").read_bytes() == pairs
    assert pairs == Path("whole/pairs/round-2.jsonl").read_bytes()
    assert pairs != Path("whole/pairs/round-1.jsonl").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in finished} == finished

    # The report has the rounds in their order, and a third one follows those that there are.
    results = json.loads(Path("cut/eval.json").read_text())
    assert [model["round"]["share"] for model in results["models"]] == [1, 2]
    assert results["models"][1]["figures"]["kl"]["value"] > 0
    assert "The rounds are joined by a line" in Path("cut/report.html").read_text()
    second = weights("cut/round-2")

    # A field that the recipe has since, at its default, is no other run.
    outcome = json.loads(Path("cut/round-1/outcome.json").read_text())
    del outcome["settings"]["data"]["workers"]
    Path("cut/round-1/outcome.json").write_text(json.dumps(outcome))
    assert run("iterate", "mine.yaml", "output_dir=cut", "rounds=3") in (0, None)
    assert weights("cut/round-2") == second
    assert weights("cut/round-3") != second

    # Another model where a finished round began is named, and nothing is trained on it.
    save_model(tmp_path / "model", seed=5)
    assert run("iterate", "mine.yaml", "output_dir=cut") == 6
    assert "round-1" in (words := capsys.readouterr().err)
    assert "has another content" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["rounds=0"], "`iterate.rounds`"),
        (["rounds=many"], "`iterate.rounds`"),
        (["iterate.reference=previous", "reference.kind=model"], "leave one of them out"),
        (["reference.kind=ema"], "iterate.reference=previous"),
        (["model.add_tokens=[x]"], "iterate.reference=previous"),
        (["data.columns={prompt: question}"], "leave `data.columns` out"),
        (["iterate.prompts=null"], "which prompts the report measures on"),
        (["iterate.pairs.beta=[1.0, 2.0]"], "each round of staged rejection is stricter"),
        (["iterate.pairs.beta=[2.0, 1.0]", "rounds=3"], "one per round"),
        (["objective={name: rloo, beta: 0.1}"], "leave `iterate.pairs` out"),
        (["objective={name: reward_model}"], "take an objective that trains a policy"),
    ],
)
def test_what_cannot_be_iterated(tmp_path, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path)
    assert run("iterate", "mine.yaml", "output_dir=out", *changes) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.startswith("alignkit: ")
    assert not Path("out").exists()


def test_a_folder_of_others_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path)
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert run("iterate", "mine.yaml", "output_dir=out") == 2
    assert "holds files that no iteration wrote (notes.txt)" in capsys.readouterr().err


def test_rounds_on_a_task_begin_with_that_tasks_model(tmp_path):
    """The pairs take the task's place among the data; the model is still the one of that task."""
    recipe = load_recipe(
        "iterative_dpo", ["data.train=task:reviews_small", f"output_dir={tmp_path}"]
    )
    folder = str(resolve("task:reviews_small").model_folder)
    first, second, _ = (point.recipe for point in rounds_of(recipe))
    assert first.model.name_or_path == folder
    assert second.model.name_or_path == str(tmp_path / "round-1" / "model")
    assert second.reference.kind == folder
    assert first.reference.kind == recipe.reference.kind
    assert [each.data.train for each in (first, second)] == [
        str(tmp_path / "pairs" / f"round-{number}.jsonl") for number in (1, 2)
    ]


def test_stages_multiply_to_the_last_tilt():
    """exp(r / beta_1) and what each later round asks for on top of it is exp(r / beta of the last)."""
    pairs = RoundPairsConfig(method="rejection", beta=[4.0, 1.0, 0.5])
    betas = [pairs.beta_of(number) for number in (1, 2, 3)]
    assert sum(1 / beta for beta in betas) == pytest.approx(1 / 0.5, abs=1e-12)
    assert betas == pytest.approx([4.0, 4 / 3, 1.0])
    assert [RoundPairsConfig(beta=0.3).beta_of(number) for number in (1, 7)] == [0.3, 0.3]


@pytest.mark.long
def test_pairs_train_the_model_of_the_recipes_task():
    """Rounds read files of pairs, which name no task: "task" would be the base of another one."""
    base = str(resolve("task:reviews_small").model_folder)
    changes = ["data.train=task:reviews_small", "teacher={name_or_path: task}"]
    first, second, _ = (point.recipe for point in rounds_of(load_recipe("iterative_dpo", changes)))
    assert (first.model.name_or_path, second.reference.kind) == (base, base)
    assert first.teacher.name_or_path == str(resolve("task:reviews_small").teacher_folder)


def test_rounds_stands_for_its_field():
    assert in_full("rounds=4") == "iterate.rounds=4"
    assert in_full("train.steps=4") == "train.steps=4"
    assert IterateConfig().rounds == 3


def test_pairs_belong_to_what_they_were_made_from(tmp_path, monkeypatch, capsys):
    """Another recipe, or another reward under the same name, is refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path)
    assert run("iterate", "mine.yaml", "output_dir=out", "rounds=1") in (0, None)
    recipe = Path("out/recipe.yaml").read_bytes()

    changed = ["iterate.pairs.samples=4", "rounds=2"]
    assert run("iterate", "mine.yaml", "output_dir=out", *changed) == 2
    assert "iterate.pairs.samples: 3 -> 4" in capsys.readouterr().err
    code = Path("worth.py")
    before = code.read_text()
    code.write_text(
        before + "\n\ndef worth(prompts, completions):\n    return [0.0] * len(prompts)\n"
    )
    assert run("iterate", "mine.yaml", "output_dir=out", "rounds=2") == 6
    assert "worth.py:worth) has another content" in capsys.readouterr().err
    assert Path("out/recipe.yaml").read_bytes() == recipe
    assert not Path("out/round-2").exists()

    code.write_text(before)
    assert run("iterate", "mine.yaml", "output_dir=out", "rounds=2") in (0, None)
