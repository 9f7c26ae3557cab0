"""Models, rows and rewards that a caller holds in Python, where a recipe would name files.

A `LiveTask` stands where the embedded tasks stand: it hands a run its rows, its reward and its
judge. What has no name gets one from a hash of its content, so that the run folder says what the
run was and a resumed run is refused other inputs.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, ModelError
from alignkit.files import sha256_of_parts
from alignkit.tasks import Task

PREFIX = "python:"  # of names that stand for live objects in a recipe


@dataclass(frozen=True)
class LiveTask(Task):
    """What `alignkit.train` was given as objects. None: the recipe names a file or a model."""

    model: Any = None  # a transformers causal LM, or a peft model around one
    tokenizer: Any = None
    # The rows that were given, by the names that the recipe has for them.
    named_rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    embedded: Task | None = None  # serves what was given by the name of an embedded task
    compute_metrics: Callable[..., Any] | None = None  # see `training/computed_metrics.py`

    @classmethod
    def of(
        cls,
        *,
        model: Any = None,
        tokenizer: Any = None,
        named_rows: Mapping[str, Sequence[Mapping[str, Any]]],
        reward: Callable[..., Any] | None = None,
        judge: Callable[..., Any] | None = None,
        embedded: Task | None = None,
        compute_metrics: Callable[..., Any] | None = None,
    ) -> "LiveTask":
        """The inputs as a task; what is None comes from the embedded task, where there is one."""
        if embedded is not None:
            reward = reward or embedded.reward
            judge = judge or embedded.judge

        return cls(
            PREFIX.rstrip(":"),
            embedded.model_folder if embedded else Path(),
            embedded.rows_folder if embedded else Path(),
            reward,  # type: ignore[arg-type]
            judge,
            embedded.environment if embedded else None,
            model,
            tokenizer,
            named_rows,
            embedded,
            compute_metrics,
        )

    @property
    def teacher_folder(self) -> Path:
        """The embedded task's teacher. ConfigError where there is no embedded task."""
        if self.embedded is None:
            raise ConfigError("teacher.name_or_path: no teacher was named; give a model's folder")
        return self.embedded.teacher_folder

    def rows(self, family: str, split: str = "train") -> list[dict[str, Any]]:
        """The rows of the embedded task. ConfigError where there is none."""
        if self.embedded is None:
            raise ConfigError(f"data.{split}: no rows were given")
        return self.embedded.rows(family, split)

    def live_rows(self, name: str) -> list[dict[str, Any]] | None:
        """The rows that were given under `name`; None where none were."""
        rows = self.named_rows.get(name)
        return None if rows is None else [dict(row) for row in rows]


def rows_of(data: Any, name: str) -> list[dict[str, Any]]:
    """A list of rows, a `datasets.Dataset` or a pandas frame as a list of rows.

    ConfigError for anything else; `name` is the argument's.
    """
    if hasattr(data, "to_list"):  # datasets.Dataset
        data = data.to_list()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # a pandas frame
        data = data.to_dict("records")
    rows = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(
            f"{name} is a {type(data).__name__}; give a path or a name, a list of rows (dicts) or a "
            "datasets.Dataset"
        )
    return [dict(row) for row in rows]


def name_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A name with a hash of the rows' content and order."""
    return f"{PREFIX}rows-{sha256(repr(rows).encode()).hexdigest()[:16]}"


def name_of_model(model: Any) -> str:
    """A name with a hash of the weights and their dtype. ModelError for what has no weights."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"model is a {type(model).__name__}; give a transformers causal language model, a peft "
            "model, a folder or a hub name"
        )

    def parts() -> Any:
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            whole = tensor.detach().cpu().contiguous()
            yield whole.flatten().view(torch.uint8).numpy().tobytes()

    return f"{PREFIX}{type(model).__name__}-{sha256_of_parts(parts())[:16]}"


def name_of_function(function: Callable[..., Any]) -> str:
    """A function's name with a hash of its source, where Python knows it."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        source = inspect.getsource(function if hasattr(function, "__name__") else type(function))
    except (OSError, TypeError):
        return f"{PREFIX}{name}"
    return f"{PREFIX}{name}-{sha256(source.encode()).hexdigest()[:16]}"
