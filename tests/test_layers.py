"""The layers are walls: a folder imports only from folders below it, and nothing runs in a circle."""

import ast
from pathlib import Path

import pytest

import alignkit

ROOT = Path(alignkit.__file__).parent

# From the top of the house to its bottom. A folder imports only from entries that stand below its
# own.
ORDER = [
    "cli",
    "integrations",
    "comparison",
    "evaluation",
    "runs",
    "tasks",
    "training",
    "sources",
    "oracles",
    "decoding",
    "judges",
    "rewards",
    "rollout",
    "data",
    "policies",
    "distributed",
    "config",
    "metrics",
    "objectives",
    "batches",
    "plan",
    "credit",
    "risk",
    "divergences",
    "kl",
    "tensors",
    "files",
    "errors",
]

# The public doors stand outside the order: only the command line and users import them.
DOORS = ["__init__", "__main__", "losses", "testing"]
MAY_IMPORT_DOORS = ["cli", *DOORS]


def place_of(module: str) -> str:
    """`alignkit.data.read` -> "data", `alignkit` -> "__init__"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path, root: Path) -> str:
    return ".".join(("alignkit", *path.relative_to(root).with_suffix("").parts))


def imported_modules(path: Path, root: Path) -> set[str]:
    """Modules of this package that a file imports anywhere in it, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    mine = {module for module in modules if module.split(".")[0] == "alignkit"}
    return {_existing(module, root) for module in mine}


def _existing(module: str, root: Path) -> str:
    """The module in which an imported name lives: the longest prefix that is a file or a folder."""
    parts = module.split(".")
    while len(parts) > 1:
        path = root.joinpath(*parts[1:])
        if path.is_dir() or path.with_suffix(".py").is_file():
            break
        parts.pop()
    return ".".join(parts)


def violations(root: Path) -> list[str]:
    """Unlisted places, arrows that do not point downwards, and circles between modules."""
    problems = []
    arrows: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        module = module_name(path, root)
        place = place_of(module)
        if place not in ORDER and place not in DOORS:
            problems.append(f"{module}: `{place}` is not listed in ORDER")
            continue
        arrows[module.removesuffix(".__init__")] = imported_modules(path, root)
        for imported in sorted(arrows[module.removesuffix(".__init__")]):
            problems += _arrow_problems(module, place, imported)
    return problems + [f"circle: {' -> '.join(circle)}" for circle in _circles(arrows)]


def _arrow_problems(module: str, place: str, imported: str) -> list[str]:
    target = place_of(imported)
    if target == place or place in DOORS:
        return []
    if target in DOORS:
        return [] if place in MAY_IMPORT_DOORS else [f"{module} imports the public door {imported}"]
    if target in ORDER and ORDER.index(target) < ORDER.index(place):
        return [f"{module} imports {imported}, which stands above it"]
    return []


def _circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One circle for every module from which it is reached first; empty where there is none."""
    circles, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for imported in sorted(arrows.get(module, ())):
            visit(imported, [*path, module])
        done.add(module)

    for module in sorted(arrows):
        visit(module, [])
    return circles


def test_arrows_point_downwards_and_nothing_runs_in_a_circle():
    problems = violations(ROOT)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("attic/box.py", "", "not listed"),
        ("heap.py", "", "not listed"),
        ("kl.py", "def late():\n    from alignkit.training.loop import train\n", "stands above it"),
        ("kl.py", "import alignkit.cli.main\n", "stands above it"),
        ("data/read.py", "from alignkit import losses\n", "public door"),
        ("data/read.py", "from alignkit.data.formats import detect\n", "circle"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, expected):
    """The test above can fail: each kind of violation is planted in a copy of the package's
    outline.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / "training").mkdir()
    (tmp_path / "cli").mkdir()
    for name in ("kl.py", "training/loop.py", "cli/main.py", "losses.py", "data/read.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "data" / "formats.py").write_text("from alignkit.data import read\n")
    assert violations(tmp_path) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert any(expected in problem for problem in violations(tmp_path)), violations(tmp_path)


def test_the_root_holds_thirteen_modules():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == {
        *("__init__", "__main__", "losses", "testing", "plan", "batches", "errors", "files"),
        *("tensors", "kl", "divergences", "risk", "credit"),
    }


def test_trl_and_model_classes_are_imported_in_one_place():
    for path in ROOT.rglob("*.py"):
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
        uses_trl = any(module.split(".")[0] == "trl" for module in modules)
        assert not uses_trl or path.parent.name == "integrations", path
        builds_models = any(module.startswith("transformers.AutoModel") for module in modules)
        assert not builds_models or path.name in ("load.py", "footprint.py"), path


def words_of(tree: ast.AST) -> set[str]:
    """Every name, attribute, argument, text and import of a file, split into its words, in lower
    case.
    """
    texts = set()
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            texts.add(node.id)
        elif isinstance(node, ast.Attribute):
            texts.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword):
            texts.add(node.arg or "")
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            texts.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            texts |= {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            texts |= {alias.name for alias in node.names}
    words = set()
    for text in texts:
        words.add(text.lower())
        words |= set("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())
    return words


def objective_names() -> set[str]:
    """Registered names and class names."""
    from alignkit.objectives import OBJECTIVES, locate

    return {*OBJECTIVES, *(locate(name)[1].lower() for name in OBJECTIVES)}


def test_the_loop_knows_no_objective():
    files = [*(ROOT / "training").glob("*.py"), *(ROOT / "sources").glob("*.py")]
    assert files
    for path in files:
        named = words_of(ast.parse(path.read_text())) & objective_names()
        assert not named, f"{path} names an objective: {named}"


@pytest.mark.parametrize(
    "line",
    [
        'if objective.name == "dpo": pass',
        "if isinstance(objective, KLPPO): pass",
        "from alignkit.objectives.preference.dpo import DPO",
        "x = job.grpo",
        "f(egpo=1)",
    ],
)
def test_a_loop_that_names_an_objective_is_found(line):
    assert words_of(ast.parse(line)) & objective_names()
