"""Text of users and models on its way to a terminal or into Markdown: shown, never obeyed."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# Controls but newline and tab, marks that turn the direction of a line, and halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CODE = re.compile(r"(`[^`]+`)")


def printable(text: object) -> str:
    r"""`text` without anything that a terminal obeys: ESC becomes `\x1b`, and so on. Newlines and
    tabs stay.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def plain(text: object) -> "Text":
    """For rich's tables and consoles: `text` in which [brackets] mean nothing."""
    from rich.text import Text

    return Text(printable(text))


def markdown_line(text: str) -> str:
    """A sentence as one line of Markdown: no tags, links or
    blocks; single back quotes still mark code.
    """
    line = re.sub(r"\s+", " ", printable(text)).strip()
    line = re.sub("``+", "'", line)
    return "".join(
        part if _CODE.fullmatch(part) else _escaped(part).replace("`", "\\`")
        for part in _CODE.split(line)
    )


def markdown_cell(text: str) -> str:
    """Text that cannot leave its cell of a table: on one line, with bars, tags and links escaped."""
    line = re.sub(r"\s+", " ", printable(text)).strip()
    return _escaped(line).replace("|", "\\|")


def fenced(language: str, lines: Sequence[str]) -> str:
    """A block of code, behind a fence that no line of it closes."""
    body = printable("\n".join(lines))
    longest = max((len(run) for run in re.findall("`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{body}\n{fence}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("<", "&lt;").replace("](", "]\\(")
