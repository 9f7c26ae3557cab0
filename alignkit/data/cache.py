"""The cache of data sets that have been checked and tokenised, so that this happens once.

An entry is a folder of its own under `data/` of the cache: the report on the rows (what `alignkit
data check` prints) and their bundles, in an Arrow file. Its name is a hash of everything that the
two depend on: the content of the rows, the tokenizer, the chat template, the settings and the code.
Few rows need no entry. Importing this imports neither torch nor transformers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, cached_property
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.checking import Checked
from alignkit.data.read import Rows
from alignkit.data.report import Report
from alignkit.data.template import given_template
from alignkit.data.template_time import CLOCK
from alignkit.errors import DataError
from alignkit.files import (
    cache_root,
    cached_folder,
    check_manifest,
    json_object,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_manifest,
    writing,
)

FEW = 10_000  # rows below which there is no entry
REPORT = "report.json"
FOLDER = "data"

# What a tokenizer is not made of: large files, and what says where it was loaded from.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
NO_CONTENT = ("chat_template", "is_local", "local_files_only", "name_or_path", "_commit_hash")

# Settings that change what is made of the rows.
SETTINGS = {
    "format",
    "columns",
    "max_length",
    "truncate",
    "append_eos",
    "control",
    "rewrite",
    "step_separator",
    "split_special_tokens",
}


class LazyTokenizer:
    """A tokenizer that is loaded when somebody needs it.

    `folder` is where its files lie, if that is known: an entry can then be looked up without it.
    """

    def __init__(self, load: Callable[[], Any], folder: Path | None = None) -> None:
        self._load = load
        self.folder = folder

    @classmethod
    def of(cls, tokenizer: Any) -> "LazyTokenizer":
        """`tokenizer` itself, or around one that is loaded."""
        return tokenizer if isinstance(tokenizer, cls) else cls(lambda: tokenizer)

    @cached_property
    def _loaded(self) -> Any:
        return self._load()

    def load(self) -> Any:
        """The tokenizer."""
        return self._loaded

    def identity(self) -> dict[str, Any] | None:
        """Its hash and its chat template; None where it cannot be saved and so has no hash."""
        if self.folder is None or not self.folder.is_dir():
            return _identity(self.load())

        # What the files were loaded as is remembered.
        files = [file for file in sorted(self.folder.iterdir()) if file.is_file()]
        content = [[f.name, sha256_of_file(f)] for f in files if f.suffix not in WEIGHTS]
        memory = cache_root() / FOLDER / f"tokenizer-{sha256_of_json([content, _code()])[:32]}.json"
        known = json_object(memory.read_bytes()) if memory.is_file() else None
        if known is None:
            known = _identity(self.load())
            if known is not None:
                with writing(memory):
                    memory.parent.mkdir(parents=True, exist_ok=True)
                    write_json(memory, known)
        return known


def _identity(tokenizer: Any) -> dict[str, Any] | None:
    with TemporaryDirectory() as name:
        try:
            tokenizer.save_pretrained(name)
        except Exception:  # those that do not come from transformers raise anything
            return None

        hashes = {}
        for file in sorted(Path(name).rglob("*")):
            if file.name == "tokenizer_config.json":
                settings = json.loads(file.read_text())
                hashes[file.name] = sha256_of_json(
                    {key: value for key, value in settings.items() if key not in NO_CONTENT}
                )
            elif file.is_file() and file.name not in TEMPLATE_FILES:
                hashes[file.name] = sha256_of_file(file)
    return {"hash": sha256_of_json(hashes), "template": getattr(tokenizer, "chat_template", None)}


def few_rows(rows: Rows) -> Rows | None:
    """The rows in memory, if there are few."""
    first = rows.rows if isinstance(rows.rows, list) else list(islice(rows.rows, FEW))
    return replace(rows, rows=first) if len(first) < FEW else None


@dataclass(frozen=True)
class Entry:
    """One entry of the cache, which may still have to be made."""

    key: str
    content: str  # hash of the rows that it is made from

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return cache_root() / FOLDER / self.key

    def made(self, build: Callable[[Path], Checked], rows: Rows) -> Checked:
        """What the entry says about `rows`. If it is not there, or damaged, `build` is called with
        a folder to fill.
        """

        def fill(folder: Path) -> None:
            with writing(folder):
                checked = build(folder)
                if sha256_of_json(rows.content()) != self.content:
                    raise DataError(f"{rows.where} changed while it was read; start again")
                reports = {
                    "report": checked.report.as_json(),
                    "as_read": checked.as_read.as_json(),
                }
                write_json(folder / REPORT, reports, indent=None)
                write_manifest(folder, {})

        cached_folder(f"{FOLDER}/{self.key}", fill, check_manifest)
        reports = json.loads((self.folder / REPORT).read_text())
        return Checked(
            Report.from_json(reports["report"], rows.where),
            Report.from_json(reports["as_read"], rows.where),
        )


def entry_of(
    rows: Rows, config: DataConfig, family: str | None, tokenizer: LazyTokenizer
) -> Entry | None:
    """The entry for what is made of `rows`; None where the content of the rows or the tokenizer has
    no hash.
    """
    content = rows.content()
    identity = None if content is None else tokenizer.identity()
    if identity is None:
        return None

    template = given_template(config) or identity["template"]
    shows_time = CLOCK in json.dumps(template)
    parts = {
        "code": _code(),
        "content": content,
        "tokenizer": identity["hash"],
        "template": template,
        "time": _time(config) if shows_time else None,
        "family": family,
        "settings": config.model_dump(mode="json", include=SETTINGS),
    }
    try:
        return Entry(sha256_of_json(parts)[:32], sha256_of_json(content))
    except (TypeError, ValueError):  # rows given in Python may hold anything
        return None


def _time(config: DataConfig) -> str:
    """What a template that asks for the time is shown."""
    now = datetime.now().isoformat(timespec="minutes")
    return now if config.template_time == "auto" else config.template_time


@cache
def _code() -> list[str]:
    """Of what makes bundles of rows: a hash of this folder, and versions."""
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return [digest.hexdigest(), *(version(name) for name in ("transformers", "tokenizers"))]
