"""Margins of preference pairs, on their way from the rows to the reward model."""

from transformers import AutoTokenizer
from world import save_model, write_rows

from alignkit.config.data import DataConfig
from alignkit.data import cache as cache_module
from alignkit.data.load import load_bundles
from alignkit.data.stored import StoredBundles, contents

ROWS = [
    {"prompt": "w3", "chosen": " w5 w6", "rejected": " w7", "margin": 0.5},
    {"prompt": "w3", "chosen": " w5 w6", "rejected": " w7", "margin": 0.25},
    {"prompt": "w3", "chosen": " w5", "rejected": " w8"},
    {"prompt": "w3", "chosen": " w5", "rejected": " w8", "margin": "much"},
]


def margins(bundles):
    return [float(b.rows["margin"]) if "margin" in b.rows else None for b in bundles]


def test_margins_of_pairs_are_kept_and_those_of_nothing_are_refused(tmp_path, monkeypatch):
    """In memory and in the cache; rows that differ in their margin alone are two rows."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = DataConfig(on_bad_row="drop")
    bundles, report = load_bundles(config, "ranked", tokenizer, source=file)
    assert margins(bundles) == [0.5, 0.25, None]
    assert "margin is 'much'; a margin is a finite number" in "\n".join(report.lines())
    assert len(set(contents(bundles))) == 3

    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "FEW", 0)
    stored, _ = load_bundles(config, "ranked", tokenizer, source=file)
    assert isinstance(stored, StoredBundles)
    assert margins(stored) == margins(bundles)
    assert list(contents(stored)) == list(contents(bundles))
    pairs, _ = load_bundles(config, "pair", tokenizer, source=file)
    assert margins(pairs) == [None, None, None, None]


def test_pairs_without_a_margin_beside_others_that_have_one_are_counted(tmp_path):
    """What is trained as 0 without having been written is a warning; no margins at all are none."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    rows = [*ROWS[:3], {**ROWS[2], "margin": None}]
    report = load_bundles(DataConfig(), "ranked", tokenizer, source=rows)[1]
    assert report.findings["no_margin"].rows == [3, 4]
    assert "which counts as 0; give every row one (50.0% of rows)" in "\n".join(report.warnings())

    for family, without in [("ranked", rows[2:]), ("pair", rows)]:
        report = load_bundles(DataConfig(), family, tokenizer, source=without)[1]
        assert report.count("no_margin") == 0
