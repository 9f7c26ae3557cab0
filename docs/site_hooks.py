"""What `mkdocs build` does beyond rendering docs/: the pages at the repository's root, and the API.

README.md becomes the first page, so that there is one text for both. A line `<!-- public: MODULE -->`
in a reference page becomes the documentation of every public name of that module; a public name
without a docstring, or on no page, is a warning, and with `--strict` an error.
"""

import inspect
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks.alignkit")
ROOT = Path(__file__).resolve().parents[1]
PUBLIC_MODULES = (
    "alignkit",
    "alignkit.losses",
    "alignkit.kl",
    "alignkit.risk",
    "alignkit.divergences",
    "alignkit.testing",
    "alignkit.oracles",
    "alignkit.integrations.trl",
)
# files at the root that the site has too: where they are -> where they go
BORROWED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.txt",
}
MARKER = re.compile(r"^<!-- public: ([\w.]+)(?: (\w+))? -->$", re.MULTILINE)
shown: set[str] = set()


def public_objects(module_name: str) -> Iterator[tuple[str, Any]]:
    """The import path and the object of each public function and class of a module.

    These are the names in its `__all__`, or else those that it defines without a leading underscore.
    """
    module = import_module(module_name)
    own = [name for name, value in vars(module).items() if _defined_in(value, module)]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield f"{value.__module__}.{value.__qualname__}", value


def _defined_in(value: Any, module: ModuleType) -> bool:
    is_code = inspect.isclass(value) or inspect.isfunction(value)
    return is_code and value.__module__ == module.__name__ and not value.__name__.startswith("_")


def undocumented(path: str, value: Any) -> Iterator[str]:
    """`path`, and the public methods and properties of a class, where they have no docstring."""
    if not inspect.getdoc(value):
        yield path
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        is_code = isinstance(member, property | classmethod | staticmethod)
        if name.startswith("_") or not (is_code or inspect.isfunction(member)):
            continue
        if not inspect.getdoc(getattr(value, name)) and not inspect.getdoc(member):
            yield f"{path}.{name}"


def on_files(files: Any, config: Any) -> Any:
    """Add the borrowed pages, the examples, and the code that the README links to."""
    shown.clear()
    examples = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.ipynb")]
    code = re.findall(r"\]\((alignkit/[\w/]+\.py)\)", (ROOT / "README.md").read_text())
    linked = [*(f"examples/{path.name}" for path in examples), *code]
    paths = BORROWED | {path: path for path in linked}
    for source, target in paths.items():
        text = (ROOT / source).read_text()
        page = _moved_links(text) if target.endswith(".md") else text
        files.append(File.generated(config, target, content=page))
    return files


def _moved_links(text: str) -> str:
    """A root page's links as they are in the site, whose root is docs/."""
    text = text.replace("](docs/results)", "](results/compare.md)").replace("](docs/", "](")
    return text.replace("](README.md", "](index.md").replace("](LICENSE)", "](LICENSE.txt)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the API, and lead links to the repository's root to their place in the site."""
    level = 3 if re.search(r"^## ", markdown, re.MULTILINE) else 2
    markdown = MARKER.sub(lambda match: _documentation(*match.groups(), level), markdown)
    for source, target in BORROWED.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown.replace("](../examples/", "](examples/")


def _documentation(module: str, folder: str | None, level: int) -> str:
    """A block per public name of a module; with a folder's name, the objectives of that folder."""
    blocks = []
    for path, value in public_objects(module):
        is_objective = path.startswith("alignkit.objectives.") and module == "alignkit"
        if is_objective != bool(folder) or (folder and f".objectives.{folder}." not in path):
            continue
        shown.add(path)
        options = f"heading_level: {level}"
        if is_objective:
            options += ", members: false"
        blocks.append(f"::: {path}\n    options: {{{options}}}")
        if is_objective:
            blocks.append(f"`{value.equation}`")
            blocks.append(_fields(value))
    return "\n\n".join(blocks)


def _fields(objective: Any) -> str:
    """The hyper-parameters of an objective's class, as a table."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in objective.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(
            f"| `{name}` | `{field.get_default(call_default_factory=True)!r}` | {meaning} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def on_post_build(config: Any) -> None:
    """Every public name is documented and on a page."""
    for module in PUBLIC_MODULES:
        for path, value in public_objects(module):
            if path not in shown:
                log.warning("%s is public but on no page of docs/reference", path)
            for name in undocumented(path, value):
                log.warning("%s is public and has no docstring", name)
