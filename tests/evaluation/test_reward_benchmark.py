"""`alignkit eval --reward-benchmark`: RewardBench 2's scores for rewards, preference models, judges."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from world import VOCAB, run, save_model, write_rows

from alignkit.evaluation.reward_benchmark import benchmark
from alignkit.metrics.rewardbench2 import log_odds_scores, rewardbench2
from alignkit.rewards import load_reward_model

# The answers say their own score; the worked example of the Ties subset.
TIES = [
    ("Ties", "ref:a", ["3"], ["1", "0"]),
    ("Ties", "tied:a", ["3", "2.5", "2"], ["0.5"]),
    ("Ties", "ref:b", ["2"], ["2.5", "0"]),
    ("Ties", "tied:b", ["4", "1"], ["0.5"]),
]
MATH = [("Math", "m1", ["2"], ["1", "0", "0.0"]), ("Math", "m2", ["2"], ["2.0", "0", "1"])]
JUDGES = """
import math

def score(prompts, completions, **_):
    return [float(text) for text in completions]

def same(prompts, completions, **_):
    return [0.0 for _ in completions]

def bradley_terry(prompts, first, second):
    return [1 / (1 + math.exp(float(b) - float(a))) for a, b in zip(first, second)]

def first_wins(prompts, first, second):
    return [1.0 for _ in first]

def silent(prompts, first, second):
    return [None for _ in first]
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Four kinds of scorers, and the rows that they are asked about."""
    (tmp_path / "judges.py").write_text(JUDGES)
    for name in ("score", "same"):
        section = f"judge: {{rewards: [{{function: 'judges.py:{name}'}}]}}"
        (tmp_path / f"{name}.yaml").write_text(section)
    for name in ("bradley_terry", "first_wins", "silent"):
        (tmp_path / f"{name}.yaml").write_text(f"judge: {{function: 'judges.py:{name}'}}")
    write_rows(
        tmp_path / "rows.jsonl",
        [
            {
                "subset": subset,
                "id": name,
                "prompt": "How much?",
                "chosen": right,
                "rejected": wrong,
            }
            for subset, name, right, wrong in [*TIES, *MATH]
        ],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_worked_example_by_the_command(world, capsys):
    """.648195 in Ties; in Math one prompt right and one that is shared by two: 3/4."""
    assert run("eval", "score.yaml", "same.yaml", "--reward-benchmark", "rows.jsonl") == 0
    printed = capsys.readouterr().out
    assert "0.6482" in printed
    assert "the figures are in eval.json" in printed
    scorer, constant = json.loads((world / "eval.json").read_text())["models"]
    assert scorer["scores"]["Ties"] == pytest.approx(0.648195, abs=5e-7)
    assert scorer["scores"]["Math"] == 0.75
    assert constant["scores"]["Math"] == 0.25  # one of four answers


def test_a_judge_of_bradley_terry_is_its_reward(world):
    """Every figure agrees, because mean log-odds are rewards up to their mean."""
    one, other = benchmark(["score.yaml", "bradley_terry.yaml"], "rows.jsonl", safe=False)["models"]
    assert other["scores"] == pytest.approx(one["scores"], abs=1e-12)
    assert other["figures"]["position_bias"] == pytest.approx(0.0, abs=1e-12)
    for name in ("accuracy", "calibration_error", "brier"):
        assert other["figures"][name] == pytest.approx(one["figures"][name], abs=1e-12)


def test_the_order_and_invalid_verdicts_decide_nothing_and_are_reported(world):
    first, silent = benchmark(["first_wins.yaml", "silent.yaml"], "rows.jsonl", safe=False)[
        "models"
    ]
    assert first["scores"]["Math"] == silent["scores"]["Math"] == 0.25
    assert first["figures"]["position_bias"] == first["figures"]["position_inconsistency"] == 1.0
    assert (first["figures"]["invalid"], silent["figures"]["invalid"]) == (0.0, 1.0)


def test_log_odds_of_sure_judges_stay_finite():
    scores = log_odds_scores([[0.5, 1.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    assert scores[0] == pytest.approx(2 / 3 * 13.8155, abs=1e-3)
    assert scores[1] == scores[2] == pytest.approx(-scores[0] / 2)


def test_a_reward_models_folder(world):
    """Its scores are those that it gives as a reward."""
    save_model(world / "lm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "pad_token_id": 0, "num_labels": 1}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB, **sizes, **heads))
    model.save_pretrained(world / "reward")
    AutoTokenizer.from_pretrained(world / "lm").save_pretrained(world / "reward")

    answers = [[f" w{i} w{j}" for j in range(3, 7)] for i in range(3, 9)]
    rows = [{"prompt": "w3", "chosen": a[:1], "rejected": a[1:]} for a in answers]
    write_rows(world / "words.jsonl", rows)
    (found,) = benchmark(["reward"], "words.jsonl", safe=True)["models"]
    reward = load_reward_model("reward")
    scores = [
        {"subset": "all", "id": "x", "num_correct": 1, "scores": reward(["w3"] * 4, each)}
        for each in answers
    ]
    assert found["scores"] == rewardbench2(scores)


@pytest.mark.parametrize(
    ("row", "words", "code", "message"),
    [
        ({"prompt": "x", "chosen": ["1"]}, [], 3, "row 1 has no rejected among prompt, chosen"),
        ({"prompt": "x", "chosen": [], "rejected": ["1"]}, [], 3, "row 1 has 0 correct and 1 wrong"),
        (None, [], 3, "has no rows"),
        ({"prompt": "x", "chosen": ["1", "2"], "rejected": "0"}, [], 3, "only Ties has several"),
        ({"prompt": "x", "chosen": 7, "rejected": "0"}, [], 3, "row 1: chosen is int (7)"),
        ({"prompt": "x", "chosen": "1", "rejected": {"0": 1}}, [], 3, "row 1: rejected is dict"),
        ({"prompt": 5, "chosen": "1", "rejected": "0"}, [], 3, "row 1: prompt is int (5)"),
        ({"prompt": "x", "chosen": ["1", None][1:], "rejected": "0"}, [], 3, "row 1: chosen is null"),
        ({"prompt": "x", "chosen": "1", "rejected": "0", "subset": "total"}, [], 3, "other than `total`"),
        ({"prompt": "x", "chosen": "1", "rejected": "0"}, ["--samples", "4"], 2, "leave out --samples"),
        ({"prompt": "x", "chosen": "1", "rejected": "0"}, ["--credit"], 2, "leave out --credit"),
    ],
)  # fmt: skip
def test_what_is_refused(world, row, words, code, message, capsys):
    write_rows(world / "bad.jsonl", [] if row is None else [row])
    assert run("eval", "score.yaml", "--reward-benchmark", "bad.jsonl", *words) == code
    words = capsys.readouterr().err
    assert message in words
    assert "runs code" not in words  # no scorer is loaded for rows that cannot be scored
    assert not (world / "eval.json").exists()


def test_names_that_are_null_are_not_given(world):
    """Parquet fills what a row does not have with null."""
    row = {"prompt": "x", "chosen": "1", "rejected": "0", "subset": None, "id": None}
    write_rows(world / "null.jsonl", [row])
    (only,) = benchmark(["score.yaml"], "null.jsonl", safe=False)["models"]
    assert only["scores"] == {"all": 1.0, "total": 1.0}


def test_what_is_no_scorer(world, capsys):
    (world / "empty.yaml").write_text("decode: {n: 3}")
    assert run("eval", "empty.yaml", "--reward-benchmark", "rows.jsonl") == 2
    assert "has a `judge` section" in capsys.readouterr().err
    for section in ("{functoin: x}", "null", "[1]"):
        (world / "empty.yaml").write_text(f"judge: {section}")
        assert run("eval", "empty.yaml", "--reward-benchmark", "rows.jsonl") == 2
    assert run("eval", "score.yaml", "--chat") == 2
    assert "--chat is for the prompts of --reward-benchmark" in capsys.readouterr().err
