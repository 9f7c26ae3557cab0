"""The cache of tokenised data: what comes out of it is what would be made anew, whatever happened
to the process that filled it.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from alignkit.data import DataConfig, check, fingerprint, load_bundles
from alignkit.data import cache as cache_module
from alignkit.data.cache import LazyTokenizer
from alignkit.data.load import check_held_out
from alignkit.data.stored import BundleWriter, StoredBundles, contents, row_lengths
from alignkit.errors import DataError

TEXTS = [
    {"prompt": f"the cat {i}", "chosen": f" sat on {i}", "rejected": f" sat {i} mats"}
    for i in range(9)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "chosen": [{"role": "assistant", "content": f"hello {i}"}],
        "rejected": [{"role": "assistant", "content": f"world {i}"}],
    }
    for i in range(4)
]
BAD = [
    {"prompt": "a", "chosen": " same", "rejected": " same"},
    {"prompt": "a", "chosen": " ", "rejected": " b"},
    TEXTS[3],  # a duplicate
    {**TEXTS[4], "chosen": TEXTS[4]["rejected"], "rejected": TEXTS[4]["chosen"]},  # a contradiction
]
MALFORMED = [{"prompt": "a", "chosen": None, "rejected": " b"}, {"prompt": "a", "chosen": " b"}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache, which takes any number of rows, in small parts, all in this process."""
    monkeypatch.setattr("alignkit.data.load.number_of_workers", lambda given: 1)
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "FEW", 0)
    monkeypatch.setattr("alignkit.data.checking.PART", 3)
    return tmp_path / "cache" / "data"


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "pairs.jsonl", [*TEXTS, *CHATS, *BAD])


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def same(bundles, others):
    assert len(bundles) == len(others)
    for one, other in zip(bundles, others, strict=True):
        assert torch.equal(one.prompt, other.prompt)
        for name in ("completions", "masks"):
            pairs = zip(getattr(one, name), getattr(other, name), strict=True)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        assert one.uid == other.uid
        assert {k: v.tolist() for k, v in one.rows.items()} == {
            k: v.tolist() for k, v in other.rows.items()
        }


@pytest.mark.parametrize("family", ["pair", "sequence", "labelled"])
def test_an_entry_gives_what_memory_gives(kinds, path, monkeypatch, family):
    config = DataConfig(train=str(path), on_bad_row="drop", max_length=12)
    written(path, [*TEXTS, *CHATS, *BAD, *MALFORMED])
    made, report = load_bundles(config, family, kinds["chat"])
    read, second = load_bundles(config, family, kinds["chat"])
    assert isinstance(made, StoredBundles)
    assert isinstance(read, StoredBundles)

    monkeypatch.setattr(cache_module, "FEW", 1000)
    monkeypatch.setattr("alignkit.data.checking.PART", 1000)
    expected, in_memory = load_bundles(config, family, kinds["chat"])
    assert isinstance(expected, list)

    for bundles, lines in ((made, report.lines()), (read, second.lines())):
        same(bundles, expected)
        assert fingerprint(bundles) == fingerprint(expected)
        assert lines == in_memory.lines()
    assert report.warnings() == second.warnings() == in_memory.warnings()
    assert list(contents(read)) == list(contents(expected))
    assert list(row_lengths(read)) == list(row_lengths(expected))
    same(read[1::2][1:], expected[1::2][1:])
    same([read[-1]], [expected[-1]])
    with pytest.raises(IndexError):
        read[len(read)]
    with pytest.raises(DataError, match="nothing is held out"):
        check_held_out(read, expected[:3], "there")


def test_a_second_check_loads_no_tokenizer(kinds, path, folder, tmp_path):
    kinds["chat"].save_pretrained(tmp_path / "model")
    config = DataConfig(train=str(path))
    loaded = []

    def load():
        loaded.append(1)
        return kinds["chat"]

    def lines():
        return check(config, LazyTokenizer(load, tmp_path / "model"), family="pair")[0].lines()

    assert lines() == lines()
    assert len(loaded) == 1
    load_bundles(config, "pair", kinds["chat"])  # training finds what the check made
    assert len(entries(folder)) == 1

    # It imports no torch either, which takes seconds.
    code = (
        "import sys; from pathlib import Path; from alignkit.data import DataConfig, check, cache;"
        f"cache.FEW = 0; model = Path({str(tmp_path / 'model')!r});"
        f"check(DataConfig(train={str(path)!r}), cache.LazyTokenizer(None, model), family='pair');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_that_matters_makes_another_entry(kinds, path, folder):
    def load(tokenizer="chat", **options):
        return load_bundles(DataConfig(train=str(path), **options), "pair", kinds[tokenizer])

    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    for number, variant in enumerate(
        (
            {},
            {"max_length": 9},
            {"truncate": "start"},
            {"append_eos": False},
            {"chat_template": template},
            {"chat_template": template + "{# other #}"},
            {"tokenizer": "metaspace", "chat_template": template},
            {"columns": {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}},
        ),
        start=1,
    ):
        load(**variant)
        assert len(entries(folder)) == number
    load(template_time="2026-01-01")  # the template shows no time
    load(on_bad_row="drop")
    assert len(entries(folder)) == number

    path.write_text(path.read_text().replace("cat 0", "dog 0"))
    load()
    assert len(entries(folder)) == number + 1


def test_malformed_rows_raise_the_same_from_an_entry(kinds, path, folder):
    written(path, [*TEXTS, *CHATS, *MALFORMED])
    config = DataConfig(train=str(path))
    with pytest.raises(DataError) as without:
        load_bundles(config, "pair", kinds["chat"])
    assert not folder.exists() or not entries(folder)

    first = check(config, kinds["chat"], family="pair")
    second = check(config, kinds["chat"], family="pair")
    assert first[0].lines() == second[0].lines()
    assert str(first[1]) == str(second[1]) == str(without.value)
    assert len(entries(folder)) == 1
    with pytest.raises(DataError) as with_entry:
        load_bundles(config, "pair", kinds["chat"])
    assert str(with_entry.value) == str(without.value)


def damages():
    yield lambda entry: (entry / "rows.arrow").write_bytes(
        (entry / "rows.arrow").read_bytes().replace(b"cat", b"dog", 1)[:-1] + b"x"
    )
    yield lambda entry: os.truncate(entry / "rows.arrow", 100)
    yield lambda entry: (entry / "report.json").unlink()
    yield lambda entry: (entry / "manifest.json").write_text("{}")


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_entry_is_made_anew(kinds, path, folder, damage):
    config = DataConfig(train=str(path))
    made, report = load_bundles(config, "pair", kinds["chat"])
    expected = list(made)
    (name,) = entries(folder)
    damage(folder / name)
    bundles, again = load_bundles(config, "pair", kinds["chat"])
    same(bundles, expected)
    assert again.lines() == report.lines()
    assert cache_module.check_manifest(folder / name) is None


def run_apart(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def test_a_killed_process_leaves_nothing_that_is_read(kinds, path, folder, monkeypatch):
    config = DataConfig(train=str(path))
    add = BundleWriter.write

    def slow(writer, bundles):
        add(writer, bundles)
        (path.parent / "began").touch()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(BundleWriter, "write", slow)
        process = run_apart(load_bundles, config, "pair", kinds["chat"])
        while not (path.parent / "began").exists():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    half = [p for p in folder.iterdir() if p.name.startswith(".tmp-") and p.is_dir()]
    assert len(half) == 1
    assert (half[0] / "rows.arrow").exists()
    assert entries(folder) == [half[0].name]
    bundles, _ = load_bundles(config, "pair", kinds["chat"])
    assert len(bundles) == len(TEXTS) + len(CHATS) + 2
    assert not half[0].exists()


def test_of_two_processes_one_makes_the_entry(kinds, path, folder, monkeypatch):
    config = DataConfig(train=str(path))
    open_writer = BundleWriter.__enter__

    def counted(writer):
        with (path.parent / "builds").open("a") as log:
            log.write("built\n")
        time.sleep(0.3)
        return open_writer(writer)

    monkeypatch.setattr(BundleWriter, "__enter__", counted)
    processes = [run_apart(load_bundles, config, "pair", kinds["chat"]) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (path.parent / "builds").read_text() == "built\n"
    assert len(entries(folder)) == 1


def test_rows_that_change_while_they_are_read_are_refused(kinds, path, folder, monkeypatch):
    add = BundleWriter.write

    def add_and_change(writer, bundles):
        add(writer, bundles)
        with path.open("a") as file:
            file.write(json.dumps(TEXTS[0]) + "\n")

    monkeypatch.setattr(BundleWriter, "write", add_and_change)
    with pytest.raises(DataError, match="changed while it was read"):
        load_bundles(DataConfig(train=str(path)), "pair", kinds["chat"])
    assert entries(folder) == []


def test_an_entry_is_mapped_without_pandas(kinds, path, folder):
    """A short run on many rows would spend longer on importing it than on the rows it visits."""
    config = DataConfig(train=str(path), on_bad_row="drop")
    load_bundles(config, "pair", kinds["chat"])
    (entry,) = entries(folder)
    look = (
        "import sys; from pathlib import Path; from alignkit.data.stored import StoredBundles; "
        f"bundles = StoredBundles(Path({str(folder / entry)!r})); "
        "print(len(bundles), len(bundles[0].prompt), 'pandas' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)

    rows, tokens, imported = out.stdout.split()
    assert int(rows) >= len(TEXTS)
    assert int(tokens) > 0
    assert imported == "False"


def test_few_rows_need_no_entry(kinds, path, folder, monkeypatch):
    monkeypatch.setattr(cache_module, "FEW", 100)
    bundles, _ = load_bundles(DataConfig(train=str(path)), "pair", kinds["chat"])
    assert isinstance(bundles, list)
    assert not folder.exists()


def test_rows_given_in_python_are_kept_if_they_are_json(kinds, folder):
    for _ in range(2):
        bundles, _ = load_bundles(DataConfig(), "pair", kinds["chat"], source=TEXTS)
        assert isinstance(bundles, StoredBundles)
    assert len(entries(folder)) == 1

    odd = [{**row, "extra": object()} for row in TEXTS]
    others, _ = load_bundles(DataConfig(), "pair", kinds["chat"], source=odd)
    assert isinstance(others, list)
    same(bundles, others)
