"""Reading the file that wandb leaves behind offline: records of protocol buffers in a log of blocks,
as LevelDB writes them.
"""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32_768  # bytes; no header of a piece spans two of them
PIECE = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def finished_records(file: Path, seconds: float = 60.0) -> list[Any]:
    """Every record, once the last one is there: wandb's own process writes it."""
    until = time.monotonic() + seconds
    while True:
        there = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in there):
            return there
        assert time.monotonic() < until, f"{file} has {len(there)} records, and no last one"
        time.sleep(0.05)


def records(file: Path) -> Iterator[Any]:
    """Every record, as wandb's own class reads it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    place = 7  # behind the file's own header
    content = b""
    while place + PIECE.size <= len(data):
        room = BLOCK - place % BLOCK
        if room < PIECE.size:
            place += room
            continue
        _, length, kind = PIECE.unpack_from(data, place)
        place += PIECE.size
        content += data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(content)
            yield record
            content = b""
