"""alignkit's objectives inside TRL's trainers: the only file that imports trl.

    Trainer = as_trl_trainer(HDPO(beta=0.1, alpha=0.9))        # a subclass of DPOTrainer, used
    exactly like it
    Trainer(model=..., args=DPOConfig(...), train_dataset=...).train()

Only the public `compute_loss` and `log` are overridden. Data, generation, rewards, saving and
scheduling stay TRL's.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.batches import Family, LossTerms, PairBatch, RolloutBatch, TokenLogps
from alignkit.errors import ConfigError, DataError
from alignkit.integrations.trl_checks import (
    check_objective,
    check_version,
    checked_arguments,
    checked_rollout_arguments,
    reads_reference_sums,
    wants_reference,
)
from alignkit.integrations.trl_tensors import entropy, on_first_token, placed
from alignkit.objectives.base import Objective
from alignkit.tensors import gather_logps

check_version()  # first, since an unknown release may fail on import with a message of its own
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer  # noqa: E402

# What a batch of each trainer may hold. Anything else (images, say) would be left unread.
PAIR_KEYS = {
    "input_ids",
    "attention_mask",
    "completion_mask",
    "ref_chosen_logps",
    "ref_rejected_logps",
}
GROUP_KEYS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "tool_mask",
}


def as_trl_trainer(objective: Objective, base: type = DPOTrainer) -> type:
    """A trainer class that minimises `objective`: a named subclass of `base` (DPOTrainer,
    GRPOTrainer or a subclass).

    Pair objectives and demonstrations go on DPOTrainer, rollout objectives on GRPOTrainer, whose
    advantages become the objective's own. Raises ConfigError for a release, trainer or objective
    that does not fit.
    """
    if not isinstance(base, type):
        raise ConfigError(
            f"as_trl_trainer: base is {base!r}, not a class; "
            "give DPOTrainer, GRPOTrainer or a subclass of one"
        )
    if any("unsloth" in f"{cls.__module__}.{cls.__name__}".lower() for cls in base.__mro__):
        raise ConfigError(
            f"as_trl_trainer: {base.__name__} is patched by unsloth, whose losses are its own; "
            "run without `import unsloth`"
        )
    if not issubclass(base, DPOTrainer | GRPOTrainer):
        raise ConfigError(
            f"as_trl_trainer: base is {base.__name__}; "
            "allowed are DPOTrainer, GRPOTrainer and their subclasses"
        )
    adapter = _Pairs if issubclass(base, DPOTrainer) else _Groups
    check_objective(objective, adapter.family, base.__name__)

    # TRL writes `_name` and `_paper` into the model card.
    name = type(objective).__name__
    arxiv = re.search(r"arXiv:([\d.]+\d)", objective.paper)
    attributes: dict[str, Any] = {
        "objective": objective,
        "__doc__": type(objective).__doc__,
        "_name": name,
        "_paper": {"title": objective.paper, "id": arxiv[1]} if arxiv else {},
    }
    return type(f"{name}{base.__name__}", (adapter, base), attributes)


class _Adapter:
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
        """The policy's forward; a mixture of experts is asked for its load-balancing loss, as TRL
        does.
        """
        if getattr(self, "aux_loss_enabled", False):
            return model(**feed, output_router_logits=True)
        return model(**feed)

    @contextmanager
    def _reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference in TRL's order: its own model, the adapter called "ref", the model without
        its adapter.
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

    def _reduced(self, out: LossTerms, outputs: Any, rows: int, tokens: Tensor) -> Tensor:
        """The batch's loss: each term's sum over its count, tokens counted over all processes.

        The metrics of `out` are kept for the next `log`.
        """
        store = self._alignkit[self._mode]
        for name, values in out.metrics.items():
            count = torch.tensor(values.numel(), dtype=torch.float64, device=values.device)
            entry = torch.stack([values.double().sum(), count])
            store[name] = store.get(name, torch.zeros_like(entry)) + entry

        counts: dict[str, Any] = {"rows": rows}
        if any(term.unit == "tokens" for term in out.terms):
            counts["tokens"] = self.accelerator.reduce(tokens.float(), "mean").clamp(min=1)
        loss = sum(term.weight * term.values.sum() / counts[term.unit] for term in out.terms)
        if getattr(self, "aux_loss_enabled", False):
            loss = loss + getattr(self, "router_aux_loss_coef") * outputs.aux_loss  # noqa: B009
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log with the objective's metrics, averaged over rows or tokens and all processes."""
        mode = self._mode
        store = self._alignkit[mode]
        self._alignkit[mode] = {}
        for name in sorted(store):
            total, count = self.accelerator.reduce(store[name]).tolist()
            logs[name if mode == "train" else f"eval_{name}"] = total / max(count, 1)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer's


class _Pairs(_Adapter):
    """On DPOTrainer: rows are [chosen; rejected]; a micro-batch returns its mean, the Trainer
    divides by the accumulation.
    """

    family = "pair"
    loss_type = "sigmoid"
    config = DPOConfig
    known_keys = PAIR_KEYS

    def _checked(self, config: Any) -> Any:
        by_token = wants_reference(self.objective) and not reads_reference_sums(self.objective)
        if config.precompute_ref_log_probs and by_token:
            raise ConfigError(
                f"{type(self).__name__}: precompute_ref_log_probs=True keeps one sum per "
                "completion, and the objective reads the reference token by token; set it to False"
            )
        return super()._checked(config)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of one micro-batch of TRL's preference collator."""
        self._check_keys(inputs)
        ids = inputs["input_ids"]
        mask = inputs["completion_mask"][:, 1:].bool()
        feed = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "use_cache": False}
        labels = ids[:, 1:][mask]

        # Counted from the end, since prompt tuning puts tokens in front. Prompt and padding are
        # left out before the log-softmax.
        window = slice(-ids.shape[1], -1)
        outputs = self._outputs(model, feed)
        logits = outputs.logits[:, window][mask]  # [M, V]

        anchor = None
        anchors = {}
        if "ref_chosen_logps" in inputs and wants_reference(self.objective):
            sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            anchors["reference"] = on_first_token(sums, mask)
        elif wants_reference(self.objective):
            with torch.no_grad(), self._reference(model) as reference:
                anchor = reference(**feed).logits[:, window][mask]

        tokens = self._tokens(logits, anchor, labels, mask, anchors)
        rows = torch.arange(len(ids), device=ids.device)
        half = len(ids) // 2  # the chosen completions stand first
        batch = PairBatch(tokens.select(rows[:half]), tokens.select(rows[half:]))
        loss = self._reduced(self.objective.loss(batch), outputs, half, mask[:half].sum())
        return (loss, outputs) if return_outputs else loss


class _Groups(_Adapter):
    """On GRPOTrainer: TRL's advantages and behaviour log-probs; in training the loss is divided by
    the accumulation.
    """

    family = "rollout"
    loss_type = "grpo"
    config = GRPOConfig
    known_keys = GROUP_KEYS

    # The trainer's own.
    temperature: float
    current_gradient_accumulation_steps: int

    def _checked(self, config: Any) -> Any:
        config, self._factor = checked_rollout_arguments(
            super()._checked(config), self.objective, type(self).__name__
        )
        return config

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of one micro-batch of TRL's rollout."""
        if return_outputs:
            raise ConfigError(
                f"{type(self).__name__}: a rollout's loss has no outputs; "
                "call compute_loss with return_outputs=False"
            )
        self._check_keys(inputs)
        ids = inputs["completion_ids"]
        completion = inputs["completion_mask"]
        mask = completion.bool() & inputs.get("tool_mask", completion).bool()
        feed = {
            "input_ids": torch.cat([inputs["prompt_ids"], ids], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], completion], 1),
            "use_cache": False,
        }
        labels = ids[mask]
        window = slice(-ids.shape[1] - 1, -1)
        outputs = self._outputs(model, feed)
        logits = outputs.logits[:, window][mask] / self.temperature

        anchor = None
        anchors = {}
        if self.objective.plan.statistics:
            with torch.no_grad(), self._reference(model) as reference:
                anchor = reference(**feed).logits[:, window][mask] / self.temperature
        elif wants_reference(self.objective):
            if "ref_per_token_logps" not in inputs:
                raise self._no_reference()
            anchors["reference"] = inputs["ref_per_token_logps"].where(mask, 0.0)
        tokens = self._tokens(logits, anchor, labels, mask, anchors)

        # Without old log-probs the policy has not moved since it sampled.
        old = inputs.get("old_per_token_logps")
        behavior = tokens.policy.detach() if old is None else old.where(mask, 0.0)
        tokens = replace(tokens, behavior=behavior)

        # TRL shuffles the members of a group apart, so every row is a group of its own here; the
        # advantages are TRL's, and come in one per row or one per token.
        advantages = self._factor[self._mode] * inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(mask.shape)
        groups = torch.arange(len(ids), device=ids.device)
        batch = RolloutBatch(tokens, advantages[:, 0], groups, advantages.where(mask, 0.0))

        loss = self._reduced(self.objective.loss(batch), outputs, len(ids), mask.sum())
        if self._mode == "train":
            return loss / self.current_gradient_accumulation_steps
        return loss


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
