"""Margins of preference pairs, on their way from the rows to the reward model."""

from transformers import AutoTokenizer
from world import save_model

from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles
from alignkit.data.stored import BundleWriter, StoredBundles, contents, pack


def test_margins_of_pairs_are_kept_and_those_of_nothing_are_refused(tmp_path):
    """In memory and in the cache; rows that differ in their margin alone are two rows."""
    rows = [
        {"prompt": "w3", "chosen": " w5 w6", "rejected": " w7", "margin": 0.5},
        {"prompt": "w3", "chosen": " w5 w6", "rejected": " w7", "margin": 0.25},
        {"prompt": "w3", "chosen": " w5", "rejected": " w8"},
        {"prompt": "w3", "chosen": " w5", "rejected": " w8", "margin": "much"},
    ]
    save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = DataConfig(on_bad_row="drop")
    bundles, report = load_bundles(config, "ranked", tokenizer, source=rows)
    margins = [0.5, 0.25, None]
    assert [
        float(m) if m is not None else m for m in (b.rows.get("margin") for b in bundles)
    ] == margins
    assert "margin is 'much'; a margin is a finite number" in "\n".join(report.lines())
    assert len(set(contents(bundles))) == 3

    folder = tmp_path / "stored"
    folder.mkdir()
    with BundleWriter(folder) as writer:
        writer.write(pack(bundles))
    again = StoredBundles(folder)
    assert [b.rows.keys() for b in again] == [b.rows.keys() for b in bundles]
    assert list(contents(again)) == list(contents(bundles))
    pairs, _ = load_bundles(config, "pair", tokenizer, source=rows)
    assert not any("margin" in bundle.rows for bundle in pairs)
