"""Writes docs/ledger.md, where each published method stands, from ledger.yaml and the registry.

python docs/make_ledger.py
"""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from make_objectives import folder_of

from alignkit.config.recipe import shipped_recipes
from alignkit.objectives import OBJECTIVES

LEDGER = Path(__file__).with_name("ledger.yaml")
PAGE = Path(__file__).with_name("ledger.md")

# What an entry says of the thing that runs it, in the order of the page.
USES = ("objective", "command", "field", "function", "example")
OPEN = "not yet"

HEAD = """# The ledger

These are the published methods that alignkit is about. {built} of {total} are built: {objectives} as an objective or a setting of one, {commands} by
a command or a field of a recipe, {functions} as a function to call. {reasons} are left out for a reason{open}.
Each built one names the test that holds it against something known: a closed form, an enumeration, a limit, a worked example.
`alignkit verify` checks the objectives beside it. Where nothing else is said, a name in the column of what runs it is an objective.

`docs/make_ledger.py` wrote this page from `ledger.yaml` and the registry.
"""


def entries() -> list[dict[str, Any]]:
    """The entries of ledger.yaml in their order."""
    ledger: list[dict[str, Any]] = yaml.safe_load(LEDGER.read_text())
    return ledger


def how(entry: dict[str, Any]) -> str:
    """What kind of thing runs an entry: "objective", "command", "function", "reason" or "open"."""
    if "objective" in entry:
        return "objective"
    if "command" in entry or "field" in entry or "example" in entry:
        return "command"
    if "function" in entry:
        return "function"
    return "open" if entry["reason"] == OPEN else "reason"


def counts(ledger: list[dict[str, Any]]) -> Counter[str]:
    """How many entries are of each kind."""
    return Counter(how(entry) for entry in ledger)


def row(entry: dict[str, Any]) -> str:
    """The line of a built entry."""
    runs = ", ".join(f"`{entry[use]}`" for use in USES if use in entry)
    recipe = str(entry.get("objective", "")).split(".")[0]
    shipped = f"`{recipe}.yaml`" if recipe in shipped_recipes() else ""
    file, _, function = entry["test"].partition("::")
    test = f"`{Path(file).name}`: {function.removeprefix('test_').replace('_', ' ')}"
    return f"| {entry['name']} | {entry['about']} | {runs} | {shipped} | {test} |"


def table(ledger: list[dict[str, Any]]) -> list[str]:
    """The built entries of one family."""
    return [
        "| method | in a few words | what runs it | recipe | the test that it is held against |",
        "|---|---|---|---|---|",
        *(row(entry) for entry in ledger),
    ]


def not_built(ledger: list[dict[str, Any]]) -> list[str]:
    """The entries without anything that runs them, those with a reason first."""
    lines = ["| method | in a few words | why not |", "|---|---|---|"]
    for entry in sorted(ledger, key=lambda entry: how(entry) == "open"):
        lines.append(f"| {entry['name']} | {entry['about']} | {entry['reason']} |")
    return lines


def beyond(ledger: list[dict[str, Any]]) -> list[str]:
    """The objectives of the registry that no entry names, by folder."""
    named = {str(entry.get("objective", "")).split(".")[0] for entry in ledger}
    others: dict[str, list[str]] = {}
    for name in OBJECTIVES:
        if name not in named:
            others.setdefault(folder_of(name), []).append(f"`{name}`")
    return [f"- {folder.replace('_', '-')}: {' '.join(names)}" for folder, names in others.items()]


def make_page() -> str:
    """The whole page."""
    ledger = entries()
    kinds = counts(ledger)
    head = HEAD.format(
        total=len(ledger),
        built=len(ledger) - kinds["reason"] - kinds["open"],
        objectives=kinds["objective"],
        commands=kinds["command"],
        functions=kinds["function"],
        reasons=kinds["reason"],
        open=f", and for {kinds['open']} only the work is missing" if kinds["open"] else "",
    )
    lines = [head]

    built = [entry for entry in ledger if "reason" not in entry]
    for family in dict.fromkeys(entry["family"] for entry in built):
        members = [entry for entry in built if entry["family"] == family]
        lines += [f"## {family[0].upper()}{family[1:]}", "", *table(members), ""]

    others = [entry for entry in ledger if "reason" in entry]
    if others:
        lines += ["## Not built", "", *not_built(others), ""]
    lines += ["## Objectives beside these", "", "The registry also has:", "", *beyond(ledger)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
    print(f"wrote {PAGE}: {dict(counts(entries()))}")
