"""The columns of files, before torch is imported. The rows are read and checked once it is."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

from alignkit.config.data import DataConfig
from alignkit.config.objective_fields import family_of
from alignkit.config.recipe import Recipe
from alignkit.config.row_sources import RowSource
from alignkit.data.checking import with_format
from alignkit.data.file_formats import TEXT_SUFFIXES, data_suffix
from alignkit.data.held_out import about_held_out
from alignkit.data.read import HeldOut, Source, open_source, reading
from alignkit.errors import DataError

FIRST = 100  # rows that are looked at
LARGEST = 1 << 24  # bytes of a JSON file, which is read whole


def check_columns(recipe: Recipe) -> None:
    """Refuse files without the columns that the recipe's objective learns from, as far as that is
    known without its class. DataError.
    """
    section = recipe.objective
    name = section.get("name") if isinstance(section, dict) else None
    family = None if name is None or recipe.data.has_streams else family_of(str(name))
    if family is None:
        return

    for trained in recipe.data.sources():
        _check(recipe.data, trained, trained, family)
    for name, held in recipe.data.held_out_sources().items():
        with about_held_out(recipe.data, name):
            _check(recipe.data, held, HeldOut(held), family)


def _check(data: DataConfig, named: RowSource, source: Source, family: str) -> None:
    """Check one source, which is read as `source`, if that is quick."""
    if not _is_quick(named):
        return
    rows = open_source(data, source)
    config = reading(data, source)
    first = replace(rows, rows=list(islice(rows.rows, FIRST)))
    try:
        with_format(first, config, family)
    except DataError:  # a column may have its first value further down
        with_format(rows, config, family)


def _is_quick(source: RowSource) -> bool:
    """Whether the first rows are there at once."""
    path = Path(source.source).expanduser()
    suffix = data_suffix(path)
    if suffix not in TEXT_SUFFIXES or not path.is_file():
        return False
    return suffix != ".json" or path.stat().st_size <= LARGEST
