"""What is said of held-out rows. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from alignkit.config.data import DataConfig
from alignkit.errors import DataError


@contextmanager
def about_held_out(config: DataConfig, name: str, stream: str | None = None) -> Iterator[None]:
    """A DataError inside says that it is about the held-out rows of the set `name` of `config`, and
    what to set. `stream` is the name of the stream whose rows they are, if they are one's.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; {_advice(config, name, stream)}") from error


def unlike_trained(config: DataConfig, stream: str | None = None) -> list[str]:
    """A note on every held-out set that is an embedded task's where none of its rows are trained on:
    a recipe that ships with the package may hold them out, and only `data.train` was changed.
    """
    trained = {source.source for source in config.sources()}
    return [
        f"warning: the held-out rows are those of {held.source}, of which nothing is trained on; set "
        f"{_field(name, stream)} to rows like those that are trained on, or {_none(name, stream)}"
        for name, held in config.held_out_sources().items()
        if held.source.startswith("task:") and held.source not in trained
    ]


def _advice(config: DataConfig, name: str, stream: str | None) -> str:
    source = config.held_out_sources()[name].source
    advice = f"these are the held-out rows, {_field(name, stream)} ({source}): set it to rows like"
    if stream is not None:
        return f"{advice} those of its source, or leave it out"
    return (
        f"{advice} those of data.train (data.split and data.eval_split take parts of one source), or "
        "data.eval=null"
    )


def _none(name: str, stream: str | None) -> str:
    """How to hold out nothing here: a set among several can only be left out."""
    return "leave it out" if name or stream is not None else "set it to null"


def _field(name: str, stream: str | None) -> str:
    if stream is not None:
        return f"`eval` of the stream {stream}"
    return f"data.eval.{name}" if name else "data.eval"
