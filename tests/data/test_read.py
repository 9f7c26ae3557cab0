"""Every source gives the same rows; a damaged file is named by file and line."""

import bz2
import gzip
import json
import lzma
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.config.data import DataConfig
from alignkit.data.file_formats import Row, read_file, read_jsonl
from alignkit.data.load import load_bundles
from alignkit.data.read import read_rows
from alignkit.errors import ConfigError, DataError

ROWS = [
    {"prompt": "One, two", "chosen": ' three "four"\nfive', "rejected": " ünï"},
    {"prompt": "1", "chosen": "2", "rejected": "3"},
]


def values(source, **options):
    rows = read_rows(DataConfig(**options), source)
    return [dict(row.values) for row in rows.rows]


def save_table(path, rows):
    table = datasets.Dataset.from_list(rows)
    getattr(
        table,
        {"csv": "to_csv", "parquet": "to_parquet", "jsonl": "to_json", "": "save_to_disk"}[
            path.suffix[1:]
        ],
    )(str(path))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "folder"])
def test_every_format_gives_back_the_rows_with_their_types(tmp_path, name):
    path = save_table(tmp_path / name, ROWS)
    assert values(path) == ROWS  # text stays text: "1" in a CSV does not become a number
    assert read_rows(DataConfig(train=str(path))).name == name


def test_tsv_and_json_in_all_its_shapes(tmp_path):
    (tmp_path / "a.tsv").write_text(
        "prompt\tchosen\trejected\n" + "\t".join(ROWS[1].values()) + "\n"
    )
    assert values(tmp_path / "a.tsv") == ROWS[1:]
    lines = "\n".join(map(json.dumps, ROWS))
    for text in (
        json.dumps(ROWS, indent=1),
        json.dumps({"train": ROWS}),
        json.dumps({"data": ROWS}),
        lines,
    ):
        (tmp_path / "a.json").write_text(text)
        assert values(tmp_path / "a.json") == ROWS


def test_a_dataset_dict_has_splits(tmp_path):
    split = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    split.save_to_disk(str(tmp_path / "both"))
    assert values(tmp_path / "both", split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"no split `valid`; the splits are train, test"):
        values(tmp_path / "both", split="valid")


def test_a_folder_of_data_files_goes_through_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    save_table(tmp_path / "repo" / "train.parquet", ROWS)
    assert values(tmp_path / "repo") == ROWS


def test_rows_in_memory_and_renamed_columns(tmp_path):
    assert values(ROWS) == ROWS
    rows = [{"question": "q", "prompt": "old", "score": 1}]
    assert values(rows, columns={"prompt": "question"}) == [{"prompt": "q", "score": 1}]
    with pytest.raises(
        DataError,
        match=r"data.columns.prompt=questoin, but the columns are question, .*did you mean question\?",
    ):
        values(rows, columns={"prompt": "questoin"})


def test_sources_that_do_not_exist(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(
        DataError, match=r"there is no file or folder .*pair\.jsonl; pairs\.jsonl is there"
    ):
        values(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match="cannot load `nobody/nothing` split `train`"):
        values("nobody/nothing")
    with pytest.raises(ConfigError, match="task:reviews is made by the command line"):
        values("task:reviews")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"ends in \.txt; files that can be read end in \.jsonl"):
        values(tmp_path / "a.txt")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{}")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("alignkit.data.file_formats.read_jsonl", denied)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl \(Permission denied\)"):
        values(tmp_path / "a.jsonl")


def test_bom_crlf_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "b"}\r\n\r\n  \n{"a": "c"}')
    assert list(read_jsonl(path)) == [Row(1, {"a": "b"}), Row(4, {"a": "c"})]
    path.write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(DataError, match=r"a\.jsonl:1: the file is UTF-16"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "b"', "Expecting ',' delimiter at column 10"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8"),
        (b'["a"]', "a JSON list, expected an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": "' + b"x" * 200_001 + b'"}', "the line is longer than 200000 bytes"),
    ],
)
def test_a_bad_line_is_a_problem_of_that_line_alone(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "b"}\n' + line + b'\n{"a": "c"}\n')
    first, bad, last = read_jsonl(path, limit=200_000)
    assert (first, last) == (Row(1, {"a": "b"}), Row(3, {"a": "c"}))
    assert bad.number == 2
    assert bad.values is None
    assert problem in bad.problem


@given(
    st.lists(
        st.binary(max_size=40) | st.dictionaries(st.text(), st.text(), max_size=2), max_size=8
    ),
    st.integers(8, 60),
)
def test_any_bytes_are_rows_or_problems(tmp_path_factory, lines, limit):
    """Fuzz: no input raises (UTF-16 apart), line numbers are right, and every good line is read."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    raw = [line.replace(b"\n", b"") for line in raw]
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(b"\n".join(raw))
    if raw and raw[0].startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    rows = {row.number: row for row in read_jsonl(path, limit=limit)}
    for number, (line, text) in enumerate(zip(lines, raw), 1):
        if isinstance(line, dict) and len(text) < limit:
            assert rows[number].values == line
        if len(text) > limit + 3:  # a BOM may be taken off
            assert rows[number].problem == f"the line is longer than {limit} bytes"


def test_damaged_files_of_other_formats(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen\na,b\nc,"d\n')
    with pytest.raises(DataError, match=r"a\.csv:3: not valid CSV"):
        values(path)
    path.write_text("prompt,chosen\na,b,c,d\n")
    assert list(read_rows(DataConfig(), path).rows) == [
        Row(1, None, "2 more cells than the header has columns")
    ]
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet: not a valid Parquet file"):
        values(path)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"a" 2}]')
    with pytest.raises(DataError, match=r"a\.json:2: Expecting ':' delimiter at column 7"):
        values(path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not a dataset saved with save_to_disk"):
        values(tmp_path / "broken")


def _repeated_parquet(path, value, rows):
    """Every row the same: the value stands in the file once."""
    column = pa.array([value] * rows)
    pq.write_table(pa.table({"text": column}), path, row_group_size=rows)


def _packed_parquet(path, value, rows):
    """Every row the same, in full, and compressed."""
    column = pa.array([value] * rows)
    pq.write_table(pa.table({"text": column}), path, compression="zstd", use_dictionary=False)


def _packed_lines(path, value, rows):
    with gzip.open(path, "wt") as file:
        file.write((json.dumps({"text": value}) + "\n") * rows)


def _packed_list(path, value, rows):
    with gzip.open(path, "wt") as file:
        json.dump([{"text": value}] * rows, file)


def _packed_cells(path, value, rows):
    with gzip.open(path, "wt") as file:
        file.write("text\n" + f"{value}\n" * rows)


PACKED = [
    ("a.parquet", _repeated_parquet),
    ("b.parquet", _packed_parquet),
    ("c.jsonl.gz", _packed_lines),
    ("d.json.gz", _packed_list),
    ("e.csv.gz", _packed_cells),
]


@pytest.mark.parametrize(("name", "write"), PACKED)
def test_a_file_that_grows_a_thousandfold_is_refused(tmp_path, monkeypatch, name, write):
    path = tmp_path / name
    write(path, "a" * 10_000, 3000)
    unpacked = 30_000_000
    assert path.stat().st_size * 200 < unpacked

    assert len(list(read_file(path, ["train"]))) == 3000  # small enough for any memory
    monkeypatch.setattr("alignkit.data.file_formats._ALWAYS_ALLOWED", 10_000_000)
    with pytest.raises(DataError, match=r"bytes grow to more than 10,000,000 when they are read"):
        list(read_file(path, ["train"]))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".lz4"])
@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.csv"])
def test_compressed_files_are_read(tmp_path, kind, suffix):
    plain = tmp_path / kind
    if kind == "a.csv":
        save_table(plain, ROWS)
    else:
        plain.write_text(json.dumps(ROWS) if kind == "a.json" else "\n".join(map(json.dumps, ROWS)))
    path = tmp_path / (kind + suffix)
    path.write_bytes(compressed(plain.read_bytes(), suffix))
    assert values(path) == ROWS

    # A damaged one is an error of ours; so is one whose content only looks compressed.
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{kind}{suffix}: cannot be decompressed"):
        values(path)
    path.write_bytes(plain.read_bytes())
    with pytest.raises(DataError, match=rf"{kind}{suffix}: cannot be decompressed"):
        values(path)


def compressed(content, suffix):
    if suffix in (".gz", ".bz2", ".xz"):
        module = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix]
        return module.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, {".zst": "zstd", ".lz4": "lz4"}[suffix]) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def test_other_suffixes_of_compressed_files_say_what_can_be_read(tmp_path):
    for name in ("a.parquet.gz", "a.txt.gz", "a.gz", "a.jsonl.zip"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"ends in .*files that can be read end in \.jsonl"):
            values(tmp_path / name)
    with pytest.raises(DataError, match=r"there is no file or folder .*missing\.jsonl\.gz"):
        values("missing.jsonl.gz")


def test_json_columns_are_decoded_in_parquet_as_in_a_saved_dataset(tmp_path):
    """The way in which TRL's documentation stores tools and messages of different shapes."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}],
            "tools": [{"name": "f", "properties": {"city": {"type": "string"}}}],
            "extra": {"one": 1},
            "plain": "[1]",
        },
        {
            "messages": [{"role": "user", "content": "b"}],
            "tools": [{"name": "g", "properties": {"zone": {"type": "integer", "minimum": 0}}}],
            "extra": None,
            "plain": "{}",
        },
    ]  # fmt: skip
    json_type = datasets.Json()
    features = datasets.Features(
        messages=datasets.List(json_type),
        tools=datasets.List(json_type),
        extra=json_type,
        plain=datasets.Value("string"),
    )
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    assert values(tmp_path / "a.parquet") == values(tmp_path / "folder") == rows

    # The Arrow type alone says it too, where the library's own description was lost.
    bare = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata(None)
    pq.write_table(bare, tmp_path / "bare.parquet")
    assert values(tmp_path / "bare.parquet") == rows


def test_a_pattern_reads_all_files_in_the_order_of_their_names(tmp_path, kinds):
    rows = [{"prompt": f"hello {i}", "chosen": " a", "rejected": " b"} for i in range(3)]
    (tmp_path / "deep").mkdir()
    save_table(tmp_path / "b.csv", rows[1:2])
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(rows[0]))
    (tmp_path / "deep" / "c.jsonl").write_text(json.dumps(rows[2]))
    assert values(tmp_path / "*.jsonl") == rows[:1]
    assert values(f"{tmp_path}/**/*.jsonl") == [rows[0], rows[2]]
    assert values(tmp_path / "[ab].*") == rows[:2]
    with pytest.raises(DataError, match=r"no file matches .*\*\.json$"):
        values(f"{tmp_path}/*.json")

    # A row is named by its own file and line, and rows of equal number stay apart.
    (tmp_path / "deep" / "c.jsonl").write_text(f"{json.dumps(rows[2])}\n" + '{"prompt": 1}')
    config = DataConfig(train=f"{tmp_path}/**/*.jsonl", on_bad_row="drop")
    bundles, report = load_bundles(config, "pair", kinds["byte_level"])
    assert [bundle.uid for bundle in bundles] == ["a.jsonl:2", "c.jsonl:1"]
    assert "missing: 1 row (c.jsonl:2)" in "\n".join(report.lines())
    assert "; c.jsonl:2: no `chosen`" in "\n".join(report.lines())


NAMED_TWICE = '{"prompt": "a", "prompt": "z", "chosen": "b", "rejected": "c"}'


def test_a_name_that_stands_twice_loses_no_value_in_silence(tmp_path):
    lines = tmp_path / "a.jsonl"
    deep = '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "c"}'
    lines.write_text(f"{NAMED_TWICE}\n{deep}\n{json.dumps(ROWS[0])}\n")
    first, second, third = read_rows(DataConfig(), lines).rows
    assert first.problem == "the name 'prompt' stands twice"
    assert second.problem == "the name 'content' stands twice"
    assert dict(third.values) == ROWS[0]

    (tmp_path / "a.json").write_text(f"[{NAMED_TWICE}]")
    with pytest.raises(DataError, match=r"a\.json: the name 'prompt' stands twice"):
        values(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    names = ["prompt", "chosen", "chosen"]
    if suffix == "csv":
        path.write_text(",".join(names) + "\n1,2,3\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, names=names), path)
    with pytest.raises(DataError, match="two columns are named 'chosen'; rename or remove one"):
        values(path)


def test_nameless_columns_of_a_csv_are_left_alone(tmp_path):
    (tmp_path / "a.csv").write_text(",,prompt\n0,1,hello\n")
    assert [row["prompt"] for row in values(tmp_path / "a.csv")] == ["hello"]


def test_a_pipe_is_refused_as_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is neither a file nor a folder; rows are read"):
        values(tmp_path / "a.jsonl")
