"""Which split is read for training and which for evaluation, and that they are not the same rows."""

import json

import datasets
import pytest
from pydantic import ValidationError

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
        with pytest.raises(DataError, match=r"^there: every held-out row is trained on too"):
            check_held_out(training, load(rows[1:3]), "there")
        notes = check_held_out(training, load([*rows_of("z"), rows[0]]), "there")
        assert notes == ["there: 1 of 3 held-out rows are trained on too"]
        assert check_held_out(training, load(rows_of("z")), "there") == []


LINES = [{"prompt": f"hello {i}", "chosen": " a", "rejected": " b"} for i in range(15)]


def numbers(config, *, evaluation=False):
    rows = read_rows(config, held_out(config) if evaluation else None)
    return [int(row.values["prompt"].split()[1]) for row in rows.rows]


@pytest.fixture(params=["jsonl", "json", "saved", "glob"])
def fifteen(request, tmp_path):
    """The source of `LINES`."""
    lines = [json.dumps(line) + "\n" for line in LINES]
    path = tmp_path / f"rows.{request.param}"
    if request.param == "saved":
        both = {"train": datasets.Dataset.from_list(LINES)}
        datasets.DatasetDict(both).save_to_disk(str(path))
    elif request.param == "json":
        path.write_text(json.dumps(LINES))
    elif request.param == "glob":
        (tmp_path / "part-1.jsonl").write_text("".join(lines[:4]))
        (tmp_path / "part-2.jsonl").write_text("".join(lines[4:]))
        path = tmp_path / "part-*.jsonl"
    else:
        path.write_text("".join(lines))
    return str(path)


@pytest.mark.parametrize(
    "split",
    ["train[:90%]", "train[90%:]", "train[3:5]", "train[-10%:]", "train[-2:]", "train[:]"],
)
def test_parts_of_rows_are_those_of_datasets(fifteen, tmp_path, split):
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    same = datasets.load_dataset(
        "json", data_files=str(tmp_path / "same.jsonl"), split=split, cache_dir=str(tmp_path)
    )
    expected = [int(row["prompt"].split()[1]) for row in same]
    assert numbers(DataConfig(train=fifteen, split=split)) == expected


def test_a_file_is_trained_on_and_held_out_in_parts(fifteen):
    parts = {"split": "train[:80%]", "eval_split": "train[80%:]"}
    config = DataConfig(train=fifteen, eval=fifteen, **parts)
    trained, held = numbers(config), numbers(config, evaluation=True)
    assert trained + held == list(range(15))
    assert len(held) == 3
    contents = [read_rows(config, source).content() for source in (None, held_out(config))]
    assert contents[0] != contents[1]

    beyond = config.model_copy(update={"eval_split": "train[150%:]"})
    rows = read_rows(beyond, held_out(beyond))
    assert not list(rows.rows)
    assert rows.where.endswith("[150%:]")  # messages say which part is empty


def test_a_split_is_not_left_unread(fifteen):
    with pytest.raises(DataError, match="no split `dev`"):
        numbers(DataConfig(train=fifteen, split="dev"))
    with pytest.raises(DataError, match="no split `dev`"):
        numbers(DataConfig(train=fifteen, split="dev[:50%]"))
    with pytest.raises(ValidationError, match="eval_split is of the held-out rows, and there are"):
        DataConfig(train=fifteen, eval_split="test")
    for share in (0.1, "0.1"):
        with pytest.raises(ValidationError, match=r"0\.1 is a number; to hold out a part"):
            DataConfig(train=fifteen, eval=fifteen, eval_split=share)
