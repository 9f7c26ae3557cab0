"""Imports that a command makes once and keeps until it ends."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Keep Python's search for cycles away from everything that is imported inside the block.

    torch and transformers make 400,000 objects that stay. Going through them again and again while
    they are made takes a fifth of the time of their import, and once more at the exit a second. A
    process that has torch already, such as one that runs several commands, is left as it is: its
    other objects may have to go.
    """
    if "torch" in sys.modules:
        yield
        return

    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
