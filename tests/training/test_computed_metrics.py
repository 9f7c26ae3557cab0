"""A user's `compute_metrics`: what it gets, what becomes of what it returns, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import pair_rows, run, save_model, write_rows

import alignkit
from alignkit import DPO
from alignkit.errors import ConfigError
from alignkit.files import read_jsonl

CODE = """
import numpy as np

def metrics(prediction):
    trained = prediction.label_ids != -100
    log_probs = (prediction.predictions * trained).sum(1)
    chosen = prediction.inputs["completion"] == 0
    assert list(np.unique(prediction.inputs["row"])) == list(range(len(chosen) // 2))
    np.savez("seen.npz", predictions=prediction.predictions, labels=prediction.label_ids,
             **prediction.inputs)
    return {"chosen": log_probs[chosen].mean(), "eval_rows": int(chosen.sum())}

def scores(prediction):
    return {"gap": float(prediction.predictions[0, 0] - prediction.predictions[1, 0])}

def clash(prediction): return {"loss": 0.0}
def text(prediction): return {"name": "much"}
def nothing(prediction): return None
number = 3
"""


def rows(count):
    """Pairs whose completions begin with a space, as words do."""
    return [
        {**row, **{key: f" {row[key]}" for key in ("chosen", "rejected")}}
        for row in pair_rows(count)
    ]


@pytest.fixture
def train(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", rows(8))
    write_rows(tmp_path / "held_out.jsonl", rows(12)[8:])
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)

    def call(recipe, *overrides):
        settings = (
            "model.name_or_path=model data.train=pairs.jsonl data.eval=held_out.jsonl output_dir=run "
            "train.steps=1 train.batch_size=4 train.log_samples_every=0 train.eval_every=1 "
            "train.micro_batch_tokens=16"
        )
        return run("train", recipe, *settings.split(), *overrides)

    return call


def last(folder):
    return read_jsonl(folder / "run" / "metrics.jsonl")[-1]


def test_log_probs_and_tokens_in_the_order_of_the_rows(train, tmp_path):
    assert train("dpo", "train.compute_metrics=mine.py:metrics", "train.metric=eval_chosen",
                 "train.metric_goal=max") == 0  # fmt: skip
    row = last(tmp_path)
    assert row["eval_rows"] == 4
    assert row["eval_chosen"] == pytest.approx(row["eval_logps/chosen"], rel=1e-5)

    seen = np.load(tmp_path / "seen.npz")
    assert seen["row"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen["completion"].tolist() == [0, 1] * 4

    # The first row, scored with transformers alone.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    pair = rows(12)[8]
    prompt = tokenizer(pair["prompt"])["input_ids"]
    ids = tokenizer(pair["prompt"] + pair["chosen"])["input_ids"] + [tokenizer.eos_token_id]
    answer = ids[len(prompt) :]
    logps = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logps.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert seen["labels"][0, : len(answer)].tolist() == answer
    torch.testing.assert_close(
        torch.tensor(seen["predictions"][0, : len(answer)]), expected, rtol=0, atol=1e-4
    )


def test_scores_of_a_reward_model(train, tmp_path):
    assert train("reward_model", "train.compute_metrics=mine.py:scores") == 0
    assert np.isfinite(last(tmp_path)["eval_gap"])


def test_a_function_in_python(train, tmp_path):
    def longest(prediction):
        return {"longest": prediction.label_ids.shape[1]}

    result = alignkit.train(
        DPO(),
        model=str(tmp_path / "model"),
        data=rows(8),
        eval_data=rows(12)[8:],
        output_dir=tmp_path / "run",
        steps=1,
        batch_size=4,
        eval_every=1,
        compute_metrics=longest,
        safe=True,
    )
    assert result.metrics["eval_longest"].iloc[-1] == 3
    assert "python:longest-" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.compute_metrics=mine.py:metrics", "--safe"], "--safe forbids it"),
        (["train.compute_metrics=mine.py:metrics", "data.eval=null"], "name some with data.eval"),
        (["train.compute_metrics=mine.py:clash"], "returns loss, which is measured already"),
        (["train.compute_metrics=mine.py:text"], "a name with a finite number"),
        (["train.compute_metrics=mine.py:nothing"], "returns a NoneType"),
        (["train.compute_metrics=mine.py:number"], "is not a function"),
    ],
)
def test_what_is_refused(train, capfd, overrides, words):
    assert train("dpo", *overrides) == ConfigError.exit_code
    assert words in " ".join(capfd.readouterr().err.split())
