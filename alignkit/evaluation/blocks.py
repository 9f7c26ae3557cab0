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
class Coloured:
    """A cell whose pieces of text have numbers: above 0 they are shaded orange, below blue, and from
    `full` on as strongly as it gets. Without numbers it is plain text.
    """

    pieces: Sequence[tuple[str, float | None]]
    full: float = 2.0

    def __str__(self) -> str:
        return "".join(text for text, _ in self.pieces)


Cell = str | Coloured


@dataclass(frozen=True)
class Table:
    """Header and rows of plain or coloured text; columns of numbers are set right."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
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
th[aria-sort] { cursor: pointer; } th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; } td.said { min-width: 9rem; overflow-wrap: anywhere; white-space: pre-line; }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; } }
"""


# A click on a column's heading sorts by it: by the number that a cell begins with, else by its text.
SORT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = row => row.cells[column].textContent.trim();
      const order = (a, b) => {
        const x = parseFloat(text(a)), y = parseFloat(text(b));
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // what is missing stays below
        const by = isNaN(x) ? text(a).localeCompare(text(b)) : x - y;
        return down ? -by : by;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report for a repository or a terminal; pictures are linked."""
    return (
        "\n\n".join([f"# {markdown_line(title)}", *(_markdown(block) for block in blocks)]) + "\n"
    )


def html(title: str, blocks: Sequence[Block], folder: Path, *, sortable: bool = False) -> str:
    """The report as one page with its pictures (in `folder`) inside; its tables can be `sortable`."""
    body = "\n".join(_html(block, folder) for block in blocks)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    start = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
    script = f"<script>{SORT}</script>\n" if sortable else ""
    return f"{start}<body><h1>{escape(title)}</h1>\n{body}\n{script}</body></html>\n"


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
    return "\n".join(
        "| " + " | ".join(markdown_cell(str(cell)) for cell in row) + " |" for row in rows
    )


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
        cells = "".join(_cell(cell, mark) for cell, mark in zip(row, marks))
        rows.append(f'<tr class="failed">{cells}</tr>' if "failed" in row else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(cell: Cell, mark: str) -> str:
    if isinstance(cell, str):
        return f"<td{mark}>{escape(cell)}</td>"
    return f'<td class="said">{"".join(_piece(*piece, cell.full) for piece in cell.pieces)}</td>'


def _piece(text: str, number: float | None, full: float) -> str:
    """A piece of text on the shade of its number, which shows where the pointer rests."""
    if number is None:
        return escape(text)
    colour = "230,97,1" if number > 0 else "33,102,172"
    strength = 0.55 * min(abs(number) / full, 1.0)
    style = f"background:rgba({colour},{strength:.2f})"
    return f'<span style="{style}" title="{number:+.2f}">{escape(text)}</span>'


def _mark(column: Sequence[Cell]) -> str:
    """Numbers are set right; single words (names of runs) are not broken."""
    texts = [str(cell) for cell in column]
    if all(_NUMBER.fullmatch(text) for text in texts):
        return ' class="number"'
    return "" if any(re.search(r"\s", text) for text in texts) else ' class="name"'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
