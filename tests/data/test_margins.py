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
