"""What the training loop is given, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from alignkit.batches import Bundle
from alignkit.config.train import TrainConfig
from alignkit.objectives.base import Objective
from alignkit.policies.pair import PolicyPair
from alignkit.sources.base import Source
from alignkit.training.reduction import Metrics
from alignkit.training.run_folder import RunFolder


@dataclass
class Job:
    """Everything that one run needs. `alignkit.runs.launch` builds it from a recipe; you may also
    build it by hand.
    """

    objective: Objective
    pair: PolicyPair
    source: Source
    config: TrainConfig
    run: RunFolder
    accelerator: Accelerator
    steps: int  # optimiser steps, also where the recipe counts epochs

    # The budget of one forward pass. It changes memory and speed, never a result.
    micro_batch_tokens: int = 4096

    # The resolved recipe as YAML, written to the run folder.
    recipe: str = ""

    # What a checkpoint must agree with to be resumed: any difference is refused by name.
    identity: Mapping[str, Any] = field(default_factory=dict)

    # This rank's share of the held-out bundles, or of several sets by their names. An empty share
    # still takes part in the evaluation; None means that no rank has any.
    evaluation: Sequence[Bundle] | Mapping[str, Sequence[Bundle]] | None = None

    # Further figures to measure at every evaluation, already over all ranks.
    measure: Callable[[], Metrics] | None = None

    # Told the metrics of every evaluation under their `eval_` names, before anything is saved.
    observe: Callable[[Metrics], None] | None = None

    # Given the step: the rows to append to samples.jsonl.
    samples: Callable[[int], list[dict[str, Any]]] | None = None

    # Given the last metrics: the text of the run's README.md.
    card: Callable[[Metrics], str] | None = None

    # Instances of transformers' TrainerCallback, told of the loop's events.
    callbacks: Sequence[Any] = ()

    # Makes further metrics of what the policy says about held-out rows: `computed_metrics.py`.
    compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None

    # Lines for the user, shown when the run starts.
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    metrics: Metrics  # of the last step, with the `eval_` names of the last evaluation
    resumed_from: int = 0
    stopped_early: bool = False
