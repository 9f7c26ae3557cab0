"""What tells one training run from another, and whether a checkpoint belongs to the run that is to
go on from it.

An identity is a nested mapping: the sections of the recipe that decide what is trained, and hashes
of rows, weights and code. Checkpoints of earlier versions know fewer fields than the recipe has
today. A field that was added since has a default that changes nothing, so such a checkpoint belongs
to every run that leaves the field at its default.
"""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from alignkit.config.recipe import Recipe
from alignkit.config.section import Section

# Parts beside the recipe that earlier versions did not record, in words.
ADDED = {
    "weights": "the weights of the models",
    "code": "the code that the recipe names",
    "prompts": "the other columns of the prompts",
}


def differences_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every field in which the identity `new` differs from `old`, as "name: old -> new"; what an
    earlier version did not record in `old` counts where it is not at its default. What is watched of
    held-out rows counts where both runs have such rows and it is known of both.
    """
    new = _as_recorded(old, new, Recipe)
    if all(_train(identity).get("metric", "auto") != "auto" for identity in (old, new)):
        return compare(old, new)
    return compare(_without_metric(old), _without_metric(new))


def _train(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    train = identity.get("train")
    return train if isinstance(train, Mapping) else {}


def _without_metric(identity: Mapping[str, Any]) -> dict[str, Any]:
    watched = ("metric", "metric_goal")
    others = {name: value for name, value in _train(identity).items() if name not in watched}
    return {**identity, "train": others} if _train(identity) else dict(identity)


def is_longer_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the identities differ in nothing but that the new run is longer."""
    before = old.get("train")
    after = new.get("train")
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return False

    longer = []
    for field in ("steps", "epochs"):
        old_length = before.get(field)
        new_length = after.get(field)
        if old_length != new_length:
            longer.append(
                old_length is not None and new_length is not None and old_length < new_length
            )
    same_length = {**after, **{field: before.get(field) for field in ("steps", "epochs")}}
    rest = differences_between(old, {**new, "train": same_length})
    return bool(longer) and all(longer) and not rest


def not_compared(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for the user about the hashes that the checkpoint `name` of an earlier version does
    not have.
    """
    missing = [ADDED[key] for key in ADDED if key not in old and new.get(key)]
    if not missing:
        return []
    return [
        f"{name} is of an earlier version and does not say whether {', '.join(missing)} have changed"
    ]


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every leaf in which two nested mappings differ, as "name: old -> new". Entries of lists of
    mappings are named by their numbers, where the lists are of one length.
    """
    differences = []
    for key in sorted({*old, *new}):
        before = old.get(key)
        after = new.get(key)
        name = f"{prefix}{key}"

        entries = _numbered(before)
        if entries and len(entries) == len(_numbered(after)):
            before, after = entries, _numbered(after)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += compare(before, after, f"{name}.")
        elif before != after:
            differences.append(f"{name}: {before} -> {after}")
    return differences


def _numbered(value: Any) -> dict[str, Any]:
    """The entries of a list of mappings by their numbers; nothing for all else."""
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        return {}
    return {str(number): entry for number, entry in enumerate(value)}


def _as_recorded(
    old: Mapping[str, Any], new: Mapping[str, Any], section: type[Section] | None
) -> dict[str, Any]:
    """`new` without the fields of `section` that `old` does not have and that are at their
    defaults, and without the parts of `ADDED` that `old` does not have.
    """
    fields = {} if section is None else section.model_fields
    defaults = {} if section is None else _defaults(section)
    recorded = {}
    for key, value in new.items():
        if key not in old:
            is_default = key in defaults and value == defaults[key]
            is_added = section is Recipe and key in ADDED
            if not (is_default or is_added):
                recorded[key] = value
        else:
            recorded[key] = _value_as_recorded(old[key], value, fields.get(key))
    return recorded


def _value_as_recorded(old: Any, new: Any, field: FieldInfo | None) -> Any:
    section = None if field is None else _section_of(field.annotation)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return _as_recorded(old, new, section)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            _as_recorded(before, after, section)
            if isinstance(before, Mapping) and isinstance(after, Mapping)
            else after
            for before, after in zip(old, new, strict=True)
        ]
    return new


def _defaults(section: type[Section]) -> dict[str, Any]:
    """The fields of a section with their defaults as an identity has them: in the types of JSON,
    and as the section's own checks leave them.
    """
    try:
        return section().model_dump(mode="json")
    except ValidationError:  # a section with a field that has to be given
        fields = section.model_fields
        return {name: field.default for name, field in fields.items() if not field.is_required()}


def _section_of(annotation: Any) -> type[Section] | None:
    """The section in an annotation such as `RewardConfig`, `TeacherConfig | None` or
    `list[RewardConfig]`.
    """
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in get_args(annotation):
        section = _section_of(part)
        if section is not None:
            return section
    return None
