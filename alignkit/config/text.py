"""From the YAML of a recipe and `a.b=value` overrides to plain data, with the line of every field.
Imports no torch.

YAML here is data: tags (Python objects among them), duplicate keys, deep nesting, many aliases,
large files and interpolations that call a function (`${oc.env:TOKEN}`) are refused. `${train.seed}`
stands for another field's value.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignkit.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_ALIASES = 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CALL = re.compile(r"\$\{[^}]*:")
Keys = tuple[str, ...]
At = Callable[[int], str]  # line number -> how an error names the place


@dataclass(frozen=True)
class Origin:
    """Where each field of a recipe was written: a line of a file, or an override."""

    name: str = "recipe"
    lines: Mapping[Keys, int] = field(default_factory=dict)
    overrides: Sequence[tuple[Keys, str]] = ()

    def at(self, keys: Keys) -> str:
        """The override that set the field or the section around it, else `file:line` of the field,
        else of what is nearest.
        """
        for assigned, text in reversed(self.overrides):
            if keys[: len(assigned)] == assigned:
                return f"override `{text}`"

        # A section that stands in no file was made by the overrides of fields inside it.
        inside = [
            text for assigned, text in self.overrides if keys and assigned[: len(keys)] == keys
        ]
        if inside and keys not in self.lines:
            return f"override `{inside[-1]}`"

        for end in range(len(keys), 0, -1):
            if keys[:end] in self.lines:
                return f"{self.name}:{self.lines[keys[:end]]}"
        return self.name


def read_recipe(
    path: Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Origin]:
    """Plain data of a recipe file with overrides applied and interpolations resolved; `defaults`
    fill absent sections first.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: larger than {MAX_BYTES:,} bytes; a recipe is a page of YAML"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    return parse_recipe(text, str(path), overrides, defaults)


def parse_recipe(
    text: str, name: str, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Origin]:
    """As `read_recipe`, for text; `name` stands for the file in errors."""

    def at(line: int) -> str:
        return f"{name}:{line}"

    node = _node_tree(text, at)
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{at(1)}: a recipe is a mapping of sections (model, data, objective, train, ...)"
        )
    data: dict[str, Any] = dict(defaults or {})
    if node is not None:
        data |= _plain(text, at)

    assigned = []
    for override in overrides:
        keys, value = _split(override)
        _assign(data, keys, value, override)
        assigned.append((keys, override))

    # Interpolations come last: `${train.seed}` is the seed after all overrides.
    origin = Origin(name, {} if node is None else _lines(node), assigned)
    try:
        resolved = OmegaConf.to_container(
            OmegaConf.create(data), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        keys = tuple(re.findall(r"[^.\[\]]+", error.full_key or ""))
        raise ConfigError(f"{origin.at(keys)}: {_first_line(error)}") from None
    return resolved, origin  # type: ignore[return-value]


def _node_tree(text: str, at: At) -> yaml.Node | None:
    """The node tree of `text`, None for an empty document;
    ConfigError for what a recipe may not contain.
    """
    depth = 0
    aliases = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            here = at(event.start_mark.line + 1)
            _refuse_code(event, here)

            # Both limits keep a small file from growing into a huge one as it is read.
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):
                aliases += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{here}: nesting deeper than {MAX_DEPTH} is not allowed")
            if aliases > MAX_ALIASES:
                raise ConfigError(f"{here}: more than {MAX_ALIASES} aliases is not allowed")
        return yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise _syntax_error(error, at) from None
    except UnicodeError:
        raise ConfigError(f"{at(1)}: not valid Unicode text") from None


def _refuse_code(event: yaml.Event, here: str) -> None:
    """Tags may make Python objects, and interpolations with a colon call a function."""
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise ConfigError(f"{here}: the tag `{tag}` is not allowed; recipes hold plain values")
    if isinstance(event, yaml.ScalarEvent) and _CALL.search(event.value):
        raise ConfigError(
            f"{here}: `{event.value}` calls a function; only `${{section.field}}` is allowed"
        )


def _plain(text: str, at: At) -> Any:
    """Python values by YAML 1.2's rules for numbers (`5e-4` is
    one), as OmegaConf reads them; no key twice.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise _syntax_error(error, at) from None
    except (OmegaConfBaseException, ValueError) as error:
        # a `${` that is not closed, or a number that Python cannot hold
        raise ConfigError(f"{at(1)}: {_first_line(error)}") from None


def _syntax_error(error: yaml.YAMLError, at: At) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 1
    problem = getattr(error, "problem", None) or getattr(error, "reason", None)
    return ConfigError(f"{at(line)}: not valid YAML: {problem or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _lines(node: yaml.Node, keys: Keys = ()) -> dict[Keys, int]:
    """The keys that lead to each field -> the line where it stands."""
    lines: dict[Keys, int] = {}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            item_keys = (*keys, str(index))
            lines[item_keys] = item.start_mark.line + 1
            lines |= _lines(item, item_keys)

    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            value_keys = (*keys, key.value)
            lines[value_keys] = key.start_mark.line + 1
            lines |= _lines(value, value_keys)
    return lines


def _split(override: str) -> tuple[Keys, Any]:
    """`a.b=value` -> (("a", "b"), the value as YAML reads it)."""

    def at(line: int) -> str:
        return f"override `{override}`"

    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{at(1)}: write it as section.field=value, for example train.steps=100")
    _node_tree(text, at)
    return tuple(key.split(".")), _plain(f"value: {text}", at)["value"]


def _assign(data: Any, keys: Keys, value: Any, override: str) -> None:
    """Set the field that `keys` lead to, making the sections on the way. In a list a key is an
    index; the index one past the end appends.
    """
    for depth, part in enumerate(keys):
        last = depth == len(keys) - 1
        parent = ".".join(keys[:depth])

        # What stands at this key if nothing does yet: the value, or a section for the next key.
        fresh: Any = value
        if not last:
            fresh = [] if keys[depth + 1].isdecimal() else {}

        if isinstance(data, list):
            if not part.isdecimal() or int(part) > len(data):
                raise ConfigError(
                    f"override `{override}`: `{parent}` is a list; "
                    f"`{part}` should be an index up to {len(data)}"
                )
            index = int(part)
            if index == len(data):
                data.append(fresh)
            elif last:
                data[index] = value
            data = data[index]

        elif isinstance(data, dict):
            if last or data.get(part) is None:
                data[part] = fresh
            data = data[part]

        else:
            raise ConfigError(f"override `{override}`: `{parent}` is {data!r}, which has no fields")
