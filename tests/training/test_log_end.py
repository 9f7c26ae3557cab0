"""The end of a log: equal to reading all of it, without doing so."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.files import json_object, read_jsonl
from alignkit.training import log_end
from alignkit.training.log_end import cut_behind, rows_backwards

JUNK = [b"", b'{"step": 2, "lo', b"\xff\xfe\x00", b"[1]", b'"\r"']
LINES = st.lists(
    st.one_of(
        st.integers(0, 9).map(lambda step: json.dumps({"step": step, "x": "ä\u2028"}).encode()),
        st.sampled_from(JUNK),
    ),
    max_size=20,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("logs") / "metrics.jsonl"


@settings(max_examples=100, deadline=None)
@given(lines=LINES, end=st.sampled_from([b"", b"\n"]), block=st.integers(1, 40))
def test_rows_come_backwards_whatever_a_block_cuts(path, lines, end, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_end, "_BLOCK", block)
        path.write_bytes(b"\n".join(lines) + end)
        assert list(rows_backwards(path)) == read_jsonl(path)[::-1]


@settings(max_examples=100, deadline=None)
@given(lines=LINES, end=st.sampled_from([b"", b"\n"]), last=st.integers(0, 9))
def test_a_short_log_is_cut_as_if_all_of_it_were_read(path, lines, end, last):
    path.write_bytes(b"\n".join(lines) + end)
    rows = [json_object(line) for line in path.read_bytes().split(b"\n")]
    expected = [row for row in rows if row is not None and row["step"] <= last]
    unreadable = rows.count(None) - (not path.read_bytes() or path.read_bytes().endswith(b"\n"))

    assert cut_behind(path, lambda row: row["step"] <= last) == unreadable
    assert read_jsonl(path) == expected
    assert path.read_bytes().count(b"\n") == len(expected)


def bytes_read() -> int:
    """How much this process has read so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what is read")
@pytest.mark.parametrize("damage", [[], [b'{"step": 41900, "lo']], ids=["whole", "damaged"])
def test_only_the_end_is_looked_at(file, damage):
    rows = [json.dumps({"step": step, "filler": "x" * 1000}).encode() for step in range(1, 42001)]
    rows[41_900:41_900] = damage
    file.write_bytes(b"\n".join(rows) + b'\n{"step": 4')

    before = bytes_read()
    assert next(rows_backwards(file))["step"] == 42000
    assert bytes_read() - before < 2**20

    before = bytes_read()
    lost = cut_behind(file, lambda row: row["step"] <= 41990)
    looked_at = bytes_read() - before
    assert lost == 1 + len(damage)
    if not damage:  # else the rows before are copied, unseen
        assert looked_at < 2 * 2**20
    assert next(rows_backwards(file))["step"] == 41990
    assert file.stat().st_size > 41_000_000


def test_a_link_is_not_cut(file):
    target = file.with_name("mine.jsonl")
    target.write_text('{"step": 9}\n')
    file.symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        cut_behind(file, lambda row: False)
    assert target.read_text() == '{"step": 9}\n'
