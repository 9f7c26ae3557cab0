"""Which split is read for training and which for evaluation, and that they are not the same rows."""

import json

import datasets
import pytest

from alignkit.config.data import DataConfig
from alignkit.data.load import check_held_out, load_bundles, load_prompts
from alignkit.data.read import held_out, read_rows
from alignkit.errors import DataError


def rows_of(name):
    return [{"prompt": f"hello {name} {i}", "chosen": " a", "rejected": " b"} for i in range(2)]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes a set with the given splits: as a saved dataset, as JSON, as a folder of files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(kind, *splits):
        path = tmp_path / f"set_{kind}"
        parts = {name: rows_of(name) for name in splits}
        if kind == "saved":
            tables = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
            datasets.DatasetDict(tables).save_to_disk(str(path))
        elif kind == "json":
            path = path.with_suffix(".json")
            path.write_text(json.dumps(parts))
        else:
            path.mkdir()
            for name, rows in parts.items():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (path / f"{name}.jsonl").write_text(text)
        return str(path)

    return save


def split_read(config, *, evaluation):
    rows = read_rows(config, held_out(config) if evaluation else None)
    return next(iter(rows.rows)).values["prompt"].split()[1]


@pytest.mark.parametrize("kind", ["saved", "json", "files"])
def test_one_set_on_both_sides_is_evaluated_on_its_held_out_split(saved, kind):
    path = saved(kind, "train", "test", "validation")
    both = DataConfig(train=path, eval=path)
    assert split_read(both, evaluation=False) == "train"
    assert split_read(both, evaluation=True) == "validation"

    named = both.model_copy(update={"eval_split": "test"})
    assert split_read(named, evaluation=True) == "test"

    # The split that is trained on is never the one that is held out.
    swapped = both.model_copy(update={"split": "validation"})
    assert split_read(swapped, evaluation=False) == "validation"
    assert split_read(swapped, evaluation=True) == "test"

    # A slice is not a name; the library understands it for folders of files and hub names.
    if kind == "files":
        sliced = both.model_copy(update={"split": "train[:1]"})
        assert len(list(read_rows(sliced).rows)) == 1


@pytest.mark.parametrize("kind", ["saved", "json", "files"])
def test_a_split_that_does_not_exist_names_those_that_do(saved, kind):
    path = saved(kind, "train", "test")
    for wrong in (
        DataConfig(train=path, split="valid"),
        DataConfig(train=path, eval=path, eval_split="valid"),
    ):
        with pytest.raises(DataError, match=r"no split `valid`; the splits are .*t.*, t"):
            list(read_rows(wrong, held_out(wrong)).rows)


@pytest.mark.parametrize("kind", ["saved", "json", "files"])
def test_a_set_without_a_held_out_split_is_refused_for_evaluation(saved, kind):
    path = saved(kind, "train")
    config = DataConfig(train=path, eval=path)
    with pytest.raises(
        DataError, match="no split `validation` or `test` or `eval`; the splits are train"
    ):
        list(read_rows(config, held_out(config)).rows)

    # Of another set its held-out split is read, or the one that there is.
    other = DataConfig(train="mine.jsonl", eval=path)
    assert split_read(other, evaluation=True) == "train"


def test_a_row_whose_columns_are_lists_of_messages_is_no_object_of_splits(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "one.json").write_text(json.dumps(row))
    (read,) = read_rows(DataConfig(train=str(tmp_path / "one.json"))).rows
    assert read.values == row


def test_the_same_rows_on_both_sides_are_refused_and_shared_ones_are_counted(kinds):
    tokenizer = kinds["metaspace"]
    rows = [*rows_of("x"), *rows_of("y")]
    for load in (
        lambda source: load_bundles(DataConfig(), "pair", tokenizer, source=source)[0],
        lambda source: load_prompts(
            DataConfig(), tokenizer, source=[{"prompt": row["prompt"]} for row in source]
        )[0],
    ):
        training = load(rows)
        with pytest.raises(DataError, match=r"^there: every row of data.eval is a row of data"):
            check_held_out(training, load(rows[1:3]), "there")
        notes = check_held_out(training, load([*rows_of("z"), rows[0]]), "there")
        assert notes == ["there: 1 of 3 held-out rows are trained on too"]
        assert check_held_out(training, load(rows_of("z")), "there") == []
