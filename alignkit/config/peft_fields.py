"""Which kinds of adapter the installed peft has, and the fields of each, as its source says: importing
peft takes seconds. Imports no torch.
"""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HUB = "PushToHubMixin"  # transformers' base of peft's configs, which has no fields


@cache
def peft_kinds() -> dict[str, tuple[str, frozenset[str]]]:
    """peft_type -> the name of its config class and that class's fields; none where a base class is
    not found. Empty where peft is not installed or is written in another way than it is today.
    """
    spec = find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [root / "config.py", *root.glob("tuners/*.py"), *root.glob("tuners/*/config.py")]
    classes = {
        node.name: node
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    return {
        kind: (name, frozenset(_fields(node, classes)))
        for name, node in classes.items()
        for kind in _kind(node)
    }


def _kind(node: ast.ClassDef) -> list[str]:
    """X of `self.peft_type = PeftType.X` in the class, if it has such a line."""
    return [
        line.value.attr
        for line in ast.walk(node)
        if isinstance(line, ast.Assign)
        and isinstance(line.value, ast.Attribute)
        and ast.unparse(line.targets[0]) == "self.peft_type"
        and ast.unparse(line.value.value) == "PeftType"
    ]


def _fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """The annotated names of a class and of its bases; none where a base is not among `classes`."""
    names = {
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    for base in map(ast.unparse, node.bases):
        inherited = _fields(classes[base], classes) if base in classes else set()
        if not inherited and base != HUB:
            return set()
        names |= inherited
    return names
