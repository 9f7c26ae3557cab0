"""A user's own metrics of held-out rows, from what the policy says about each of their tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from alignkit.batches import Bundle
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import ConfigError
from alignkit.tensors import Outputs, TokenLogps
from alignkit.training.reduction import Metrics, Reducer

# With it comes transformers' trainer and peft, for which most runs have no use.
if TYPE_CHECKING:
    from transformers import EvalPrediction

IGNORED = -100  # transformers' label of what is not trained

Compute = Callable[["EvalPrediction"], Mapping[str, Any]]


def evaluated(reducer: Reducer, compute: Compute | None, bundles: Sequence[Bundle]) -> Metrics:
    """The objective's metrics of `bundles`, this rank's share, and what `compute` makes of them.

    `compute` gets a transformers `EvalPrediction` of N completions in the order of the rows:
    - `predictions` [N, T] float32: the log-probs of their tokens under the policy; for reward and
      preference models the outputs [N, D]
    - `label_ids` [N, T] int64: the tokens; IGNORED where they are not trained, or behind the end
    - `inputs`: `row` [N], the number of each one's row, and `completion` [N], its number in the row
      (of a pair 0 is chosen, 1 rejected)

    It runs on the first process. ConfigError for what is no mapping of new names to finite numbers.
    """
    if compute is None:
        return reducer.evaluate(bundles)

    bundles = list(bundles)
    places = {id(bundle): place for place, bundle in enumerate(bundles)}
    seen: list[dict[str, Any]] = []

    def see(chunk: Sequence[Bundle], values: TokenLogps | Outputs) -> None:
        for row, (bundle, number) in enumerate(_completions(chunk)):
            if bundle.mismatched:  # a measure of the objective's own, no row of the data
                continue
            trained = bundle.masks[number].numpy()
            labels = np.where(trained, bundle.completions[number].numpy(), IGNORED)
            output = _output(values, row, len(labels))
            place = places[id(bundle)]
            seen.append({"row": place, "completion": number, "output": output, "labels": labels})

    metrics = reducer.evaluate(bundles, see)
    accelerator = reducer.accelerator
    own = [{**completion, "rank": accelerator.process_index} for completion in seen]
    everyone = gather_object(own) if accelerator.num_processes > 1 else own

    computed: list[Metrics] = [{}]
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            computed = [_checked(compute, compute(_prediction(everyone)), metrics)]
    return metrics | broadcast_object_list(computed)[0]


def _completions(chunk: Sequence[Bundle]) -> list[tuple[Bundle, int]]:
    return [(bundle, number) for bundle in chunk for number in range(len(bundle.completions))]


def _output(values: TokenLogps | Outputs, row: int, length: int) -> Any:
    """What the model says about a completion: a number for each token, or for each output."""
    numbers: Tensor = (
        values.values[row] if isinstance(values, Outputs) else values.policy[row, :length]
    )
    return numbers.float().cpu().numpy()


def _prediction(completions: Sequence[Mapping[str, Any]]) -> "EvalPrediction":
    """All completions in the order of the rows, of which the processes take turns."""
    from transformers import EvalPrediction

    ordered = sorted(completions, key=lambda c: (c["row"], c["rank"], c["completion"]))
    rows = [(completion["row"], completion["rank"]) for completion in ordered]
    numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    return EvalPrediction(
        _padded([c["output"] for c in ordered], 0.0),
        _padded([c["labels"] for c in ordered], IGNORED),
        inputs={  # type: ignore[arg-type]
            "row": np.array([numbers[row] for row in rows]),
            "completion": np.array([c["completion"] for c in ordered]),
        },
    )


def _padded(rows: Sequence[Any], filling: float) -> Any:
    """Arrays under one another [N, T]."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), filling, rows[0].dtype)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded


def _checked(compute: Compute, given: Any, measured: Metrics) -> Metrics:
    """The metrics without `eval_`, which all names of an evaluation get. ConfigError."""
    name = getattr(compute, "__name__", type(compute).__name__)
    where = f"train.compute_metrics: {name} returns"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} a {type(given).__name__}; it has to be {{name: number}}")

    metrics = {}
    for key, value in given.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (isinstance(key, str) and math.isfinite(number)):
            raise ConfigError(
                f"{where} {key!r}: {value!r}; it has to be a name with a finite number"
            )
        metrics[key.removeprefix("eval_")] = number

    taken = sorted(metrics.keys() & measured.keys())
    if taken:
        raise ConfigError(f"{where} {', '.join(taken)}, which is measured already; rename it")
    return metrics
