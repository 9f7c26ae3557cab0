"""`alignkit eval`: what it measures of runs and models, what it says, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from world import pair_rows, run, save_model, write_rows

from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.evaluation.evaluate import evaluate
from alignkit.evaluation.page import write_page
from alignkit.evaluation.request import Request, checked
from alignkit.runs.launch import run_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, a DPO run and an IPO run from it, and data of every kind."""
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "base")
    write_rows(folder / "pairs.jsonl", pair_rows(6))
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(3, 9)])
    write_rows(folder / "text.jsonl", [{"text": "w3 w4 w5"}])
    (folder / "worth.py").write_text(
        "def worth(prompts, completions, **_):\n    return [float('w5' in text) for text in completions]\n"
    )
    shared = [
        f"model.name_or_path={folder / 'base'}",
        f"data.train={folder / 'pairs.jsonl'}",
        "train.batch_size=4",
    ]
    shared += [
        "train.steps=4",
        "train.warmup_steps=0",
        "train.eval_every=0",
        "train.save_every=0",
        "train.log_samples_every=0",
    ]
    shared += ["train.learning_rate=1e-2", "rollout.max_new_tokens=5"]
    for name in ("dpo", "ipo"):
        run_recipe(load_recipe(name, [*shared, f"output_dir={folder / name}"]))
    return folder


@pytest.fixture
def asked(world):
    """The least that has to be said of a run whose data have no held-out part."""
    return {"prompts": str(world / "prompts.jsonl"), "reward": f"{world / 'worth.py'}:worth"}


@pytest.fixture(scope="module")
def found(world):
    return evaluate(
        Request(
            [str(world / "dpo"), str(world / "ipo" / "model")],
            prompts=str(world / "prompts.jsonl"),
            reward=f"{world / 'worth.py'}:worth",
            pairs=str(world / "pairs.jsonl"),
            text=str(world / "text.jsonl"),
            unrelated=str(world / "pairs.jsonl"),
            correct=1.0,
            wrongly_accepted=0.5,
            samples=4,
        )
    )


def test_settings_come_from_the_run(world, found):
    assert found["settings"] == {
        "reference": str(world / "base"), "prompts": 6, "samples": 4, "max_new_tokens": 5, "seed": 0,
    }  # fmt: skip
    assert [model["name"] for model in found["models"]] == ["dpo", "model"]


def test_every_model_has_every_figure(found):
    for model in found["models"]:
        figures = model["figures"]
        assert {
            "score",
            "kl",
            "kl_k1",
            "kl_per_token",
            "forward_kl",
            "entropy",
            "length",
            "distinct_1",
        } <= set(figures)
        assert figures["kl"]["low"] <= figures["kl"]["value"] <= figures["kl"]["high"]
        assert figures["kl"]["value"] > 1e-3
        assert figures["kl_per_token"]["value"] < figures["kl"]["value"]
        assert 0 <= model["win_rate"]["value"] <= 1
        assert model["win_rate"]["invalid"] == 0
        assert set(model["pass_at_k"]) == {1, 2, 4}
        assert model["pass_at_k"][1] == pytest.approx(figures["score"]["value"])
        assert model["kl_unrelated"]["value"] > 1e-3
        assert model["perplexity"]["policy"] != model["perplexity"]["reference"] > 1
        assert model["preferences"]["pairs"] == 6
    assert found["base"]["figures"]["kl"]["value"] == 0
    assert "win_rate" not in found["base"]
    dpo, plain = (model["preferences"] for model in found["models"])
    assert dpo["accuracy"] > 0.5
    assert sum(dpo["bins"]["counts"]) == 6
    assert "calibration_error" not in plain  # a plain model has no beta


def test_a_verifier_that_errs_and_the_map_of_models(found, tmp_path):
    for model in found["models"]:
        assert model["verified_at_k"][1] == pytest.approx(model["pass_at_k"][1], abs=1e-12)
        assert model["verified_at_k"][4] <= model["pass_at_k"][4]
    distances = found["model_map"]
    assert list(distances) == ["base", "dpo", "model"]
    assert distances["dpo"]["dpo"] == 0
    assert distances["dpo"]["base"] == pytest.approx(distances["base"]["dpo"])
    # Half the variance is the KL to second order, and these runs are short.
    kl = found["models"][0]["figures"]["kl"]["value"]
    assert 0.2 * kl < distances["dpo"]["base"] < 5 * kl
    write_page(found, tmp_path / "page.html")
    assert "KL on unrelated prompts" in (tmp_path / "page.html").read_text()


def test_a_rate_of_errors_needs_a_bar(world):
    with pytest.raises(ConfigError, match="say with --correct"):
        checked(Request([str(world / "dpo")], wrongly_accepted=0.5))


def test_baselines_and_verdicts(found):
    rows = {row["n"]: row for row in found["baselines"]}
    assert set(rows) == {2, 4}
    for n in (2, 4):  # of scores that are 0 or 1 the best of n is pass@n
        assert rows[n]["score"] == pytest.approx(found["base"]["pass_at_k"][n], abs=1e-12)
    assert rows[2]["kl"] <= rows[2]["kl_bound"] + 1e-12
    assert len(found["verdicts"]) == 3
    assert all(
        " over " in verdict or "no difference shown" in verdict for verdict in found["verdicts"]
    )


def test_the_command_prints_a_table_and_writes_json(world, asked, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        run(
            "eval",
            world / "dpo",
            "--prompts",
            asked["prompts"],
            "--reward",
            asked["reward"],
            "--samples",
            2,
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "dpo",
        "6 prompts, 2 completions each, up to 5 tokens",
        "KL to the reference, nats",
        "win rate over the base",
    ):
        assert words in printed
    assert "perplexity" not in printed  # rows that nobody asked for are left out
    kept = json.loads(Path("eval.json").read_text())
    assert kept["models"][0]["model"] == str(world / "dpo")
    assert run("eval", world / "dpo", "--prompts", asked["prompts"]) == 2
    assert "eval.json exists already; name another file with --to" in capsys.readouterr().err


def test_the_same_request_gives_the_same_figures(world, asked):
    first, second = (evaluate(Request([str(world / "dpo")], samples=3, **asked)) for _ in range(2))
    assert first == second
    other = evaluate(Request([str(world / "dpo")], samples=3, seed=1, **asked))
    assert other["base"]["figures"]["entropy"] != first["base"]["figures"]["entropy"]


def test_without_a_score_there_is_still_the_kl(world, asked):
    found = evaluate(Request([str(world / "dpo")], prompts=asked["prompts"], samples=2))
    assert "score" not in found["models"][0]["figures"]
    assert found["models"][0]["figures"]["kl"]["value"] > 0
    assert (found["baselines"], found["verdicts"]) == ([], [])


def test_a_listed_world_gets_exact_figures():
    found = evaluate(Request(["task:reviews_small"], samples=4))
    (model,) = found["models"]
    assert model["exact"]["kl"] == pytest.approx(0, abs=1e-9)
    assert model["exact"]["efficiency"] is None  # no KL, no gain to divide
    assert model["exact"]["score"] == pytest.approx(found["base"]["exact"]["score"], abs=1e-9)
    assert found["baselines"][0]["kl"] < found["baselines"][0]["kl_bound"]
    assert "no difference shown" in found["verdicts"][0]
    assert found["settings"]["max_new_tokens"] < 64  # what the model's context leaves


def test_a_game_is_judged_by_its_judge():
    """The base against itself under the same noise: every verdict is a tie."""
    (model,) = evaluate(Request(["task:cyclic_small"], samples=2))["models"]
    assert (model["win_rate"]["value"], model["win_rate"]["invalid"]) == (0.5, 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"models": ["{world}/nowhere"]}, ModelError, "there is no folder"),
        ({"models": ["{world}/base"]}, ConfigError, "give --reference MODEL"),
        ({"models": ["{world}/dpo", "{world}/elsewhere"]}, ConfigError, "do not share one start"),
        ({"models": ["{world}/unfinished"]}, ModelError, "has not finished"),
        ({"models": ["task:revews"]}, ConfigError, "Did you mean `reviews`?"),
        ({"reference": "{world}/other"}, ModelError, "have different tokenizers"),
        ({"prompts": "{world}/empty.jsonl"}, DataError, "has 0 rows"),
        ({"prompts": "{world}/promts.jsonl"}, DataError, "prompts.jsonl is there"),
        ({"prompts": None}, ConfigError, "give --prompts FILE"),
        ({"prompts": "task:nothing"}, ConfigError, "there is no task `nothing`"),
        ({"reward": "worth.py:worth", "safe": True}, ConfigError, "--safe does not allow that"),
    ],
)
def test_what_is_refused(world, asked, change, error, words):
    (world / "empty.jsonl").write_text("")
    for name, start in (("elsewhere", "other"), ("unfinished", "base")):
        (world / name).mkdir(exist_ok=True)
        text = (world / "dpo" / "recipe.yaml").read_text()
        (world / name / "recipe.yaml").write_text(
            text.replace(str(world / "base"), str(world / start))
        )
    (world / "elsewhere" / "model").mkdir(exist_ok=True)
    if not (world / "other").exists():
        save_model(world / "other")
        tokenizer = world / "other" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"seven"'))

    def placed(value):
        if isinstance(value, list):
            return [placed(v) for v in value]
        return value.format(world=world) if isinstance(value, str) else value

    given = {
        "models": [str(world / "dpo")],
        "samples": 2,
        **asked,
        **{k: placed(v) for k, v in change.items()},
    }
    with pytest.raises(error) as refused:
        evaluate(Request(**given))
    assert words in str(refused.value)


def test_refusals_come_before_torch(tmp_path):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "alignkit",
        "eval",
        str(tmp_path / "nowhere"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    *imports, message = done.stderr.splitlines()
    assert message.startswith("alignkit: there is no folder")
    assert not [
        line
        for line in imports
        if line.split("|")[-1].strip() in ("torch", "transformers", "datasets")
    ]


def test_decoders_stand_where_runs_stand(world, asked, capsys, tmp_path):
    """A fusion has an exact KL, a pool an interval; both have a price, and a run's is its tokens."""
    sections = {
        "half": f"model: {world / 'dpo'}\n  method: fuse\n  weights: {{policy: 0.5, reference: 0.5}}",
        "soft": "method: soft_best_of\n  n: 3\n  beta: 0.2",
        "on_top": f"model: {world / 'dpo'}\n  method: soft_best_of\n  n: 2\n  beta: 1e9",
    }
    for name, section in sections.items():
        (tmp_path / f"{name}.yaml").write_text(f"decode:\n  {section}\n")
    files = [str(tmp_path / f"{name}.yaml") for name in sections]
    to = tmp_path / "eval.json"
    request = [world / "dpo", *files, "--prompts", asked["prompts"], "--reward", asked["reward"]]
    assert run("eval", *request, "--samples", 4, "--to", to) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "reward calls per completion" in printed

    models = {model["name"]: model for model in json.loads(to.read_text())["models"]}
    assert list(models) == ["dpo", "half", "soft", "on_top"]
    means = {
        name: {key: entry["value"] for key, entry in model["figures"].items()}
        for name, model in models.items()
    }
    assert 0 < means["half"]["kl"] < means["dpo"]["kl"]
    assert "kl_low" not in means["half"]
    assert means["soft"]["kl_low"] <= means["soft"]["kl"] <= 1.1  # log 3
    assert means["soft"]["reward_calls"] == 3
    assert means["half"]["sampled"] == pytest.approx(2 * means["half"]["length"])
    assert means["dpo"]["sampled"] == means["dpo"]["length"]

    # With a beta without force the pool's output is the run's own sample, at the run's own KL.
    assert means["on_top"]["kl"] == pytest.approx(means["on_top"]["kl_low"], abs=1e-6)
    assert means["on_top"]["kl"] == pytest.approx(means["dpo"]["kl"], abs=1.0)
    assert models["soft"]["decode"]["n"] == 3


def test_decoders_of_a_listed_world_have_exact_laws(tmp_path):
    (tmp_path / "bon.yaml").write_text("decode: {method: best_of, n: 2}")
    (model,) = evaluate(
        Request([str(tmp_path / "bon.yaml")], reference="task:reviews_small", samples=4)
    )["models"]
    (same,) = (
        row
        for row in evaluate(Request(["task:reviews_small"], samples=4))["baselines"]
        if row["n"] == 2
    )
    assert model["exact"]["score"] == pytest.approx(same["score"], abs=1e-9)
    assert model["exact"]["kl"] == pytest.approx(same["kl"], abs=1e-9)


def test_the_distance_of_a_run_to_its_own_optimum(world, asked):
    """DPO's optimum is the tilt at its beta; a model that is no run has none to be away from."""
    models = [str(world / "dpo"), str(world / "ipo"), str(world / "ipo" / "model")]
    dpo, ipo, plain = evaluate(Request(models, samples=4, distance=64, **asked))["models"]
    ends = dpo["distance"]
    assert ends["beta"] == load_recipe(world / "dpo" / "recipe.yaml").objective["beta"]
    assert 0 < ends["low"]["value"] < ends["high"]["value"] + 0.05  # up to the sampling error
    assert "distance" not in ipo
    assert "distance" not in plain
