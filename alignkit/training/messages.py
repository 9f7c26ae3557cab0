"""Lines for the user on stderr. The package reports through the standard library's logger
`alignkit`; this is the handler that shows what it reports.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from alignkit.config.escaping import printable

log = logging.getLogger("alignkit")


class PlainLines(logging.Handler):
    """Prints each message on stderr as it is, without a level, a time or markup.

    stderr is looked up for every message: a progress bar puts itself in its place and shows the
    line above the bar.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        try:
            print(printable(self.format(record)), file=sys.stderr, flush=True)
        except Exception:  # as every handler of the standard library: a message ends no run
            self.handleError(record)


@contextmanager
def shown_messages() -> Iterator[None]:
    """Inside the block, messages of level INFO and above are shown on stderr.

    Where the logger has a handler already, of an outer block or of the program that uses the
    package, nothing is changed.
    """
    if log.handlers:
        yield
        return

    handler = PlainLines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
