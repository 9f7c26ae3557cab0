"""What a recipe's `train` section names of the user's own code: callbacks and metrics."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from alignkit.config.plugins import load_object
from alignkit.errors import ConfigError
from alignkit.runs.live import LiveTask

if TYPE_CHECKING:
    from alignkit.runs.context import RunContext


def callbacks(context: "RunContext") -> list[Any]:
    """An instance of each of the recipe's callbacks. ConfigError for what is none."""
    names = context.recipe.train.callbacks
    if not names:
        return []

    # With this come the trainer and peft: seconds that a run without callbacks can do without.
    from transformers import TrainerCallback

    instances = []
    for spec in names:
        cls = load_object(spec, what="train.callbacks", safe=context.safe)
        if not (isinstance(cls, type) and issubclass(cls, TrainerCallback)):
            raise ConfigError(
                f"train.callbacks: {spec} is not a subclass of transformers.TrainerCallback"
            )
        instances.append(cls())
    return instances


def compute_metrics(
    context: "RunContext", has_held_out: bool
) -> Callable[[Any], Mapping[str, Any]] | None:
    """The recipe's function that makes metrics of held-out rows, or the one given in Python; None
    where there is none. ConfigError for what cannot be called, and where nothing is held out.
    """
    spec = context.recipe.train.compute_metrics
    if spec is None:
        return None
    if not has_held_out:
        raise ConfigError(
            f"train.compute_metrics={spec} measures the held-out rows of a data set; name some with "
            "data.eval (objectives that sample have none: measure what they sample with a reward)"
        )

    function: Any = context.task.compute_metrics if isinstance(context.task, LiveTask) else None
    if function is None:
        function = load_object(spec, what="train.compute_metrics", safe=context.safe)
    if not callable(function):
        raise ConfigError(f"train.compute_metrics: {spec} is not a function")
    loaded: Callable[[Any], Mapping[str, Any]] = function
    return loaded
