"""A report as blocks, written once and rendered twice: as
Markdown, and as one HTML page that needs no network.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from alignkit.config.escaping import markdown_cell, markdown_line


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` in back quotes."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, with its meaning in words; `name`
    stands for it where it cannot be seen.
    """

    file: str
    name: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Header and rows of plain text; columns of numbers are set right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""  # a summary behind which a long table is folded away in HTML


Block = Heading | Text | Items | Picture | Table
_NUMBER = re.compile(r"[-+]?\d.*|-||failed")
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #444; font-size: .92rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; margin: .6rem 0; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; } .name { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { background: #f2f2f2; padding: 0 .2em; } summary { cursor: pointer; color: #0b4f8a; }
tr.failed td { background: #fbeaea; }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; } }
"""


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report for a repository or a terminal; pictures are linked."""
    return (
        "\n\n".join([f"# {markdown_line(title)}", *(_markdown(block) for block in blocks)]) + "\n"
    )


def html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The report as one page with its pictures (in `folder`) inside."""
    body = "\n".join(_html(block, folder) for block in blocks)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    start = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
    return f"{start}<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {markdown_line(block.text)}"
    if isinstance(block, Text):
        return markdown_line(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {markdown_line(item)}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{block.name}]({block.file})\n\n{markdown_line(block.caption)}"
    rows = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n".join("| " + " | ".join(markdown_cell(cell) for cell in row) + " |" for row in rows)


def _html(block: Block, folder: Path) -> str:
    """One block as HTML; pictures are read from `folder`."""
    if isinstance(block, Heading):
        return f"<h2>{escape(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        data = b64encode((folder / block.file).read_bytes()).decode()
        image = f'<img alt="{escape(block.name)}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{_inline(block.caption)}</figcaption></figure>"

    table = f'<div class="wide">{_table(block)}</div>'
    if block.folded:
        return f"<details><summary>{escape(block.folded)}</summary>{table}</details>"
    return table


def _table(block: Table) -> str:
    columns = zip(*block.rows) if block.rows else [[""] for _ in block.header]
    marks = [_mark(column) for column in columns]
    head = "".join(f"<th{mark}>{escape(cell)}</th>" for cell, mark in zip(block.header, marks))
    rows = []
    for row in block.rows:
        cells = "".join(f"<td{mark}>{escape(cell)}</td>" for cell, mark in zip(row, marks))
        rows.append(f'<tr class="failed">{cells}</tr>' if "failed" in row else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _mark(column: Sequence[str]) -> str:
    """Numbers are set right; single words (names of runs) are not broken."""
    if all(_NUMBER.fullmatch(cell) for cell in column):
        return ' class="number"'
    return "" if any(re.search(r"\s", cell) for cell in column) else ' class="name"'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
