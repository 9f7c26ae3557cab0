"""Loading of a user's own objective, reward or judge: `module:Name` or `path/to/file.py:Name`."""

import ast
import importlib
import importlib.util
import logging
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from alignkit.config.validation import nearest
from alignkit.errors import ConfigError

log = logging.getLogger("alignkit")


def load_object(spec: str, *, what: str, safe: bool = False) -> object:
    """The object that `spec` names, for the recipe field `what` (named in errors, and in the log
    before its code runs).

    `module:Name` is looked up on Python's path, then as `module.py` in the working directory; a
    name ending in `.py` is a file. ConfigError when `safe`, or when there is no such thing. Errors
    raised by the user's own code keep their traceback.
    """
    source, name = _source_and_name(spec, what, safe)
    log.warning("alignkit: %s runs code from %s", what, spec)
    try:
        module = _load_module(source, what)
    except SyntaxError as error:
        raise ConfigError(
            f"{what}: {error.filename}:{error.lineno} is not valid Python ({error.msg})"
        ) from None
    try:
        return getattr(module, name)
    except AttributeError:
        named = vars(module).items()  # without what it imports
        public = ", ".join(
            n for n, value in named if not n.startswith("_") and not isinstance(value, ModuleType)
        )
        raise ConfigError(f"{what}: {source} has no `{name}`; it has: {public}") from None


def check_spec(spec: str, *, what: str, safe: bool = False) -> None:
    """Refuse what `load_object` would refuse before any code runs: `safe`, a name that is none, a
    file or module that is not there, and a name that a file does not define. ConfigError.
    """
    source, name = _source_and_name(spec, what, safe)
    if source.endswith(".py"):
        _check_name(_existing(Path(source), what), name, what)
    elif source.isidentifier() and importlib.util.find_spec(source) is None:
        _check_name(_local_module(source, what), name, what)


def _check_name(path: Path, name: str, what: str) -> None:
    """ConfigError where a file of Python cannot define `name`, as far as its text says."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError):  # said better when the file is loaded
        return
    stars = any(
        isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)
    )
    names = {written for node in ast.walk(tree) for written in _names_of(node)}
    if stars or name in names or names & {"globals", "__getattr__", "setattr"}:
        return
    public = ", ".join(
        written for node in tree.body for written in _names_of(node) if not written.startswith("_")
    )
    raise ConfigError(
        f"{what}: {path} has no `{name}`.{nearest(name, names)} It has: {public or 'nothing'}"
    )


def _names_of(node: ast.AST) -> list[str]:
    """The names that a piece of Python mentions or defines by itself."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.id] if isinstance(node, ast.Name) else []


def _source_and_name(spec: str, what: str, safe: bool) -> tuple[str, str]:
    """`module` or `file.py`, and the name in it."""
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise ConfigError(f"{what}: got `{spec}`; write `module:Name` or `path/to/file.py:Name`")
    if safe:
        raise ConfigError(
            f"{what}: `{spec}` would run code that the recipe names; --safe does not allow that"
        )
    return source, name


def _load_module(source: str, what: str) -> ModuleType:
    if source.endswith(".py"):
        return _load_file(Path(source), what)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        # Only an absent `source` is looked for as a file; an absent import inside it is an error.
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise
    except (TypeError, ValueError):  # a leading dot, an empty part
        raise ConfigError(
            f"{what}: `{source}` is not a module name; "
            "write `module:Name` or `path/to/file.py:Name`"
        ) from None

    return _load_file(_local_module(source, what), what)


def _local_module(source: str, what: str) -> Path:
    """The file of a module that is not on Python's path."""
    local = Path(f"{source}.py")
    if local.is_file():
        return local
    raise ConfigError(
        f"{what}: found neither a module `{source}` on Python's path nor "
        f"a file {local} in {Path.cwd()}"
    )


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path.resolve()}")
    return path


def _load_file(path: Path, what: str) -> ModuleType:
    """Each file is loaded once per process, so that its classes stay the same objects; once more
    where it has been edited since.
    """
    content = _existing(path, what).read_bytes()
    path_hash = sha256(str(path.resolve()).encode() + content).hexdigest()[:12]
    module_name = f"_alignkit_{path.stem}_{path_hash}"
    if module_name in sys.modules:
        return sys.modules[module_name]

    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: pydantic looks annotations up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
