"""`data.rewrite`: pairs as demonstrations of how to rewrite either answer into the chosen one."""

import pytest
from transformers import AutoTokenizer
from world import save_model

from alignkit.config.data import DataConfig
from alignkit.data.file_formats import numbered
from alignkit.data.load import load_bundles
from alignkit.data.read import Rows
from alignkit.data.rewrites import rewrites
from alignkit.errors import ConfigError, DataError

ASK = " w15"
PAIR = {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("rewrites")))


def loaded(tokenizer, rows, family="sequence", **changes):
    return load_bundles(DataConfig(rewrite=ASK, **changes), family, tokenizer, source=rows)


def made(*values):
    rows = rewrites(Rows("file", "file", list(numbered(values))), ASK, "sequence")
    return list(rows.rows)


def test_either_answer_is_rewritten_into_the_chosen_one(tokenizer):
    bundles, report = loaded(tokenizer, [PAIR])
    assert [b.prompt.tolist() for b in bundles] == [[3, 4, 6, 7, 15], [3, 4, 5, 15]]
    assert [[c.tolist() for c in b.completions] for b in bundles] == [[[5, 2]], [[5, 2]]]
    assert (report.total, report.usable) == (2, 2)

    rejected, chosen = made(PAIR)
    assert (rejected.number, chosen.number) == (1, 2)
    assert (rejected.place, chosen.place) == ("file:1 rejected", "file:1 chosen")


def test_a_system_text_stays_before_the_prompt(tokenizer):
    (bundle, _), _ = loaded(tokenizer, [{**PAIR, "system": "w9", "label": True, "margin": 1.0}])
    assert bundle.prompt.tolist() == [9, 3, 4, 6, 7, 15]


def test_chats_are_asked_by_the_user():
    """Also where the pair's dialogues repeat the prompt, and where it is nothing but their beginning."""
    question = {"role": "user", "content": "q"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    ask = {"role": "user", "content": ASK}
    wanted = [([question, bad, ask], [good]), ([question, good, ask], [good])]
    dialogues = {"chosen": [question, good], "rejected": [question, bad]}
    for values in (
        {"prompt": [question], "chosen": [good], "rejected": [bad]},
        {"prompt": [question], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", **dialogues},
        dialogues,
    ):
        rows = [row.values for row in made(values)]
        assert [(row["prompt"], row["completion"]) for row in rows] == wanted


def test_bad_rows_are_counted_and_named(tokenizer):
    rows = [PAIR, {**PAIR, "chosen": PAIR["rejected"]}, {**PAIR, "rejected": None}]
    bundles, report = loaded(tokenizer, rows, on_bad_row="drop")
    assert len(bundles) == 2
    assert report.total == 4
    assert {name: finding.count for name, finding in report.findings.items()} == {
        "identical": 1,
        "null": 1,
    }
    said = "\n".join(report.lines())
    assert "rejected is null" in said
    assert "rows:3" in said
    with pytest.raises(DataError, match=r"rows:3.*rejected is null"):
        loaded(tokenizer, rows)
    (row,) = made({"chosen": "q good", "rejected": "q bad"})
    assert "give a column prompt" in row.problem


def test_what_is_refused(tokenizer):
    with pytest.raises(DataError, match="needs preference pairs"):
        loaded(tokenizer, [{"prompt": "w3", "completion": " w5"}])
    with pytest.raises(ConfigError, match="learns from pair data"):
        loaded(tokenizer, [PAIR], family="pair")
    with pytest.raises(ValueError, match="at least 1 character"):
        DataConfig(rewrite="")
