"""What the adapters of TRL's trainers share: arguments, reference, reduction and metrics. It
imports no trl.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.batches import Family, LossTerms, TokenLogps
from alignkit.errors import ConfigError, DataError
from alignkit.integrations.trl_checks import checked_arguments
from alignkit.integrations.trl_tensors import entropy, placed
from alignkit.objectives.base import Objective
from alignkit.tensors import gather_logps

# The metric that is a sum since training began, where the others are averages since the last log.
TOKENS = "num_tokens"


class Adapter:
    """What both families share: checked arguments, reference forwards, reduction and metrics.

    It stands in front of a TRL trainer among the bases of a class, and so may use its attributes.
    """

    objective: ClassVar[Objective]
    family: ClassVar[Family]  # of batches: pair or rollout
    loss_type: ClassVar[str]  # a loss of TRL that needs nothing beside the batch
    config: ClassVar[type]  # of the arguments
    known_keys: ClassVar[set[str]]  # what a batch may hold

    # The trainer's own.
    model: Any
    ref_model: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any):
        # Scripts give the trainer's arguments by position or by name, or leave them out.
        given = list(args)
        place = _place_of_args(type(self))
        by_position = len(given) > place
        config = given[place] if by_position else kwargs.get("args")
        if config is None:
            config = self._default_config(given[0] if given else kwargs.get("model"))
        if not isinstance(config, self.config):
            raise ConfigError(
                f"{type(self).__name__}: args is a {type(config).__name__}; "
                f"give a {self.config.__name__}"
            )
        config = self._checked(config)
        if by_position:
            given[place] = config
        else:
            kwargs["args"] = config

        # Metrics since the last log: name -> [sum, number of elements].
        self._alignkit: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._trained_tokens = 0.0
        super().__init__(*given, **kwargs)

    def _default_config(self, model: Any) -> Any:
        """The arguments of a script that gives none, with an output folder as TRL would name it."""
        path = model
        if not isinstance(model, str):
            path = getattr(getattr(model, "config", None), "_name_or_path", "")
        name = path.rstrip("/").rpartition("/")[2] or "model"
        return self.config(f"{name}-{type(self.objective).__name__}")

    def _checked(self, config: Any) -> Any:
        return checked_arguments(config, self.objective, type(self).__name__, self.loss_type)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _check_keys(self, inputs: Mapping[str, Any]) -> None:
        unknown = sorted(
            {key for key, value in inputs.items() if value is not None} - self.known_keys
        )
        if unknown:
            raise DataError(
                f"{type(self).__name__}: the batch holds {', '.join(unknown)}, which this adapter "
                "does not read; it trains on text alone, collated by TRL"
            )

    def _outputs(self, model: Any, feed: Mapping[str, Any]) -> Any:
        """The policy's forward; a mixture of experts is asked for its
        load-balancing loss, as TRL does.
        """
        if getattr(self, "aux_loss_enabled", False):
            return model(**feed, output_router_logits=True)
        return model(**feed)

    def _completions(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """What the model is fed for a batch of sampled completions, and the mask [N, T] of the tokens
        that it wrote itself.
        """
        ids = inputs["completion_ids"]
        completion = inputs["completion_mask"]
        feed = {
            "input_ids": torch.cat([inputs["prompt_ids"], ids], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], completion], 1),
            "use_cache": False,
        }
        return feed, completion.bool() & inputs.get("tool_mask", completion).bool()

    @contextmanager
    def _reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference in TRL's order: its own model, the adapter
        called "ref", the model without its adapter.
        """
        if getattr(self, "ref_model", None) is not None:
            yield self.ref_model
            return

        inner = self.accelerator.unwrap_model(model)
        if not hasattr(inner, "peft_config"):
            raise self._no_reference()
        if "ref" in inner.peft_config:
            trained = inner.active_adapter
            inner.set_adapter("ref", inference_mode=True)
            try:
                yield model
            finally:
                inner.set_adapter(trained)
        else:
            with inner.disable_adapter():
                yield model

    def _no_reference(self) -> ConfigError:
        return ConfigError(
            f"{type(self).__name__}: {type(self.objective).__name__} needs a reference, but TRL "
            "holds no reference model and this batch brings no log-probs of one; use TRL's own "
            "data collator, and leave trainer.beta as it is"
        )

    def _tokens(
        self,
        logits: Tensor,
        anchor: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        anchors: dict[str, Tensor],
    ) -> TokenLogps:
        """Log-probs, entropy and the plan's statistics of the masked tokens.

        logits   [M, V] of the policy at the M masked places
        anchor   [M, V] of the reference, or None where it is known already or not needed
        labels   [M]
        mask     [N, T]
        anchors  reference log-probs [N, T] that are known already
        """
        extras = {"entropy": entropy(logits)}
        statistics = self.objective.plan.statistics
        if statistics:
            policy_logprobs = logits.float().log_softmax(-1)
            anchor_logprobs = None if anchor is None else anchor.float().log_softmax(-1)
            for name, statistic in statistics.items():
                extras[name] = statistic(policy_logprobs, anchor_logprobs, labels)
        if anchor is not None:
            anchors = {"reference": placed(gather_logps(anchor, labels), mask)}

        return TokenLogps(
            placed(gather_logps(logits, labels), mask),
            anchors,
            mask,
            extras={name: placed(values, mask) for name, values in extras.items()},
        )

    def _losses(self, out: LossTerms, rows: int, tokens: Tensor) -> list[Tensor]:
        """The loss of each term of the batch: its sum over its count, tokens counted over all
        processes. The metrics of `out` are kept for the next `log`.
        """
        self._keep(out.metrics)
        counts: dict[str, Any] = {"rows": rows}
        if any(term.unit == "tokens" for term in out.terms):
            counts["tokens"] = self.accelerator.reduce(tokens.float(), "mean").clamp(min=1)
        return [term.weight * term.values.sum() / counts[term.unit] for term in out.terms]

    def _total(self, losses: list[Tensor], outputs: Any) -> Tensor:
        """The batch's loss, with the load-balancing loss of a mixture of experts."""
        loss = torch.stack(losses).sum()
        if getattr(self, "aux_loss_enabled", False):
            self._keep({"aux_loss": outputs.aux_loss.detach()})
            loss = loss + getattr(self, "router_aux_loss_coef") * outputs.aux_loss  # noqa: B009
        return loss

    def _keep(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep sums and counts of the metrics' elements for the next `log`."""
        store = self._alignkit[self._mode]
        for name, values in metrics.items():
            count = torch.tensor(values.numel(), dtype=torch.float64, device=values.device)
            entry = torch.stack([values.double().sum(), count])
            store[name] = store.get(name, torch.zeros_like(entry)) + entry

    def _count_tokens(self, mask: Tensor) -> None:
        """Count the tokens of `mask` as trained on; an evaluation logs the number and adds none."""
        share = self._mode == "train"
        self._keep({TOKENS: mask * share / getattr(self, "_tp_size", 1)})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log with the metrics that were kept, averaged over
        their elements and all processes.
        """
        mode = self._mode
        store = self._alignkit[mode]
        self._alignkit[mode] = {}
        for name in sorted(store):
            total, count = self.accelerator.reduce(store[name]).tolist()
            value = total / max(count, 1)
            if name == TOKENS:
                self._trained_tokens += total
                value = self._trained_tokens
            logs[name if mode == "train" else f"eval_{name}"] = value
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer's


def _place_of_args(cls: type) -> int:
    """Position of the parameter `args` behind `self` in TRL's constructor; scripts may give it
    without its name.
    """
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters
        argument = parameters.get("args")
        if argument and argument.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return list(parameters).index("args") - 1  # without `self`
    raise AssertionError("neither DPOTrainer nor GRPOTrainer takes args")
