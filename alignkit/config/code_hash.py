"""What a user's own function depends on, as a hash, without running it. Standard library only.

A result that came from a reward function belongs to the code of that function. The hash covers the
function's definition, every top-level statement of its file that it uses directly or indirectly,
and the same of the user's modules that these import. Comments, layout and other functions of the
file do not matter. Installed packages are not followed, nor files that the function reads.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignkit.files import sha256_of_json

INSTALLED = {"site-packages", "dist-packages"}
DYNAMIC = {"globals", "eval", "exec"}  # by these a name is found without being written down


def code_hash(spec: str) -> str:
    """SHA-256 of the code behind `file.py:NAME` or `module:NAME`, in hex.

    Where there is no such file, the hash is that of `spec` itself.
    """
    source, _, name = spec.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).expanduser()
    else:
        located = _module_file(source, [Path(), *map(Path, sys.path)])
        file = located or Path(f"{source}.py")

    code = _Code()
    code.add(file, name)
    return sha256_of_json([spec, *code.parts] if code.parts else spec)


class _Code:
    """Statements, collected over several files."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.seen: set[tuple[Path, str | None]] = set()

    def add(self, file: Path, name: str | None) -> None:
        """Collect what `name` of `file` depends on; the whole file where `name` is None."""
        key = (file.resolve(), name)
        if key in self.seen or not file.is_file():
            return
        self.seen.add(key)

        content = file.read_bytes()
        try:
            statements = ast.parse(content).body
        except (SyntaxError, ValueError):
            self.parts.append(repr(content))
            return

        needed = statements if name is None else _needed(statements, name)
        for statement in needed:
            self.parts.append(ast.dump(statement))
            for imported, imported_name in _imports(statement, file):
                self.add(imported, imported_name)


def _needed(statements: Sequence[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that `name` depends on, in their order; all of them where that cannot be
    told from the text.
    """
    bound = [_bound(statement) for statement in statements]
    used = [
        {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        for statement in statements
    ]
    if not any(name in names for names in bound) or any(DYNAMIC & names for names in used):
        return list(statements)

    # Statements that bind no name, such as calls, may change anything.
    chosen = {place for place, names in enumerate(bound) if not names}
    wanted = {name}.union(*(used[place] for place in chosen))
    while True:
        more = {place for place, names in enumerate(bound) if names & wanted} - chosen
        if not more:
            return [statements[place] for place in sorted(chosen)]
        chosen |= more
        wanted |= set().union(*(used[place] for place in more))


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement gives a value to."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}

    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names - {"*"}


def _imports(statement: ast.stmt, file: Path) -> Iterator[tuple[Path, str | None]]:
    """The user's own files that a statement imports, each with the name that it takes from there."""
    places = [file.parent, Path(), *(Path(p) for p in sys.path if not _is_installed(Path(p)))]
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if module := _module_file(alias.name, places):
                    yield module, None

        elif isinstance(node, ast.ImportFrom):
            folder = file.parent.joinpath(*[".."] * max(0, node.level - 1))
            where = [folder] if node.level else places
            package = _module_file(node.module or "__init__", where)
            for alias in node.names:
                path = f"{node.module}.{alias.name}" if node.module else alias.name
                module = _module_file(path, where)
                if module is not None:
                    yield module, None
                elif package is not None:
                    yield package, None if alias.name == "*" else alias.name


def _module_file(module: str, places: Sequence[Path]) -> Path | None:
    """The file of a module in one of the folders; None for alignkit itself and where there is none."""
    parts = module.split(".")
    if parts[0] == "alignkit":
        return None
    for place in places:
        path = place.joinpath(*parts)
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _is_installed(folder: Path) -> bool:
    """Whether a folder of Python's path holds installed packages or the standard library."""
    standard = Path(ast.__file__).parent
    return bool(INSTALLED & set(folder.parts)) or folder == standard or standard in folder.parents
