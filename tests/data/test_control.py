"""`data.control`: labelled completions as demonstrations under a text for each label."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import run, save_model, write_rows

from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles
from alignkit.errors import ConfigError, DataError

GOOD, BAD = "w15", "w16"
CONTROL = {"desirable": GOOD, "undesirable": BAD}
# Either answer half of the time; w5 is good in 4 of 5 rows, w6 in 1 of 5.
ROWS = [
    {"prompt": "w3", "completion": f" {answer}", "label": k < good}
    for answer, good in (("w5", 4), ("w6", 1))
    for k in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    save_model(folder / "base")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def loaded(folder, rows, family="sequence", **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    config = DataConfig(control=CONTROL, **changes)
    return load_bundles(config, family, tokenizer, source=rows)


def test_the_label_becomes_the_text_before_the_prompt(folder):
    rows = [
        {"prompt": "w3", "completion": " w5", "label": True},
        {"prompt": "w3", "completion": " w5", "label": 0, "system": "w9"},
        {"prompt": "w3", "completion": " w5", "label": "maybe"},
    ]
    bundles, report = loaded(folder, rows, on_bad_row="drop")
    assert [b.prompt.tolist() for b in bundles] == [[15, 3], [16, 9, 3]]
    assert "label is 'maybe', expected true or false" in "\n".join(report.lines())


def test_training_learns_the_law_given_the_label(folder):
    """p(y) P(good | y) / P(good): .8 for w5 under the good text, .2 under the bad one."""
    control = f"data.control={{desirable: {GOOD}, undesirable: {BAD}}}"
    sizes = ["train.steps=80", "train.batch_size=10", "train.learning_rate=1e-2"]
    quiet = ["train.save_every=0", "train.warmup_steps=0", f"output_dir={folder / 'run'}"]
    where = [f"model.name_or_path={folder / 'base'}", f"data.train={folder / 'rows.jsonl'}"]
    assert run("train", "sft", *where, control, *sizes, *quiet) == 0

    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    prompts = torch.tensor([[15, 3], [16, 3]])
    with torch.no_grad():
        law = model(prompts).logits[:, -1].softmax(-1)[:, [5, 6]]
    wanted = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    torch.testing.assert_close(law, wanted, atol=0.02, rtol=0)


def test_what_is_refused(folder):
    with pytest.raises(DataError, match="needs labelled completions"):
        loaded(folder, [{"prompt": "w3", "completion": " w5"}])
    with pytest.raises(ConfigError, match="learns from labelled data"):
        loaded(folder, ROWS, family="labelled")
    with pytest.raises(ValueError, match="both texts are the same"):
        DataConfig(control={"desirable": "a", "undesirable": "a"})
