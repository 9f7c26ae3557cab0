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
from alignkit.objectives.base import Objective
from alignkit.tensors import gather_logps

check_version()  # before importing an unknown release fails in a way of its own
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer  # noqa: E402

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
}
GROUP_KEYS |= {
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "tool_mask",
}
CHUNK = 1024  # tokens whose vocabulary is looked at together for the entropy


def as_trl_trainer(objective: Objective, base: type = DPOTrainer) -> type:
    """A trainer class that minimises `objective`: a named subclass of `base` (DPOTrainer,
    GRPOTrainer or a subclass).

    Pair objectives and demonstrations go on DPOTrainer, rollout objectives on GRPOTrainer, whose
    advantages become the objective's own. Raises ConfigError for a release, trainer or objective
    that does not fit.
    """
    if not isinstance(base, type):
        raise ConfigError(
            f"as_trl_trainer: base is {base!r}, not a class; give DPOTrainer, GRPOTrainer or a subclass of one"
        )
    if any("unsloth" in f"{cls.__module__}.{cls.__name__}".lower() for cls in base.__mro__):
        raise ConfigError(
            f"as_trl_trainer: {base.__name__} is patched by unsloth, whose losses are its own; run without `import unsloth`"
        )
    if not issubclass(base, DPOTrainer | GRPOTrainer):
        raise ConfigError(
            f"as_trl_trainer: base is {base.__name__}; allowed are DPOTrainer, GRPOTrainer and their subclasses"
        )
    mixin = _Pairs if issubclass(base, DPOTrainer) else _Groups
    check_objective(objective, mixin.family, base.__name__)
    name = type(objective).__name__
    arxiv = re.search(r"arXiv:([\d.]+\d)", objective.paper)
    # what TRL's model card names
    card = {
        "_name": name,
        "_paper": {"title": objective.paper, "id": arxiv[1]} if arxiv else {},
    }
    return type(
        f"{name}{base.__name__}",
        (mixin, base),
        {"objective": objective, "__doc__": type(objective).__doc__, **card},
    )


class _Adapter:
    """What both families share: checked arguments, reference forwards, reduction and metrics."""

    objective: ClassVar[Objective]
    family: ClassVar[Family]
    loss_type: ClassVar[str]
    config: ClassVar[type]
    known: ClassVar[set[str]]

    def __init__(self, *args: Any, **kwargs: Any):
        given = list(args)
        place = _place_of_args(type(self))
        config = given[place] if len(given) > place else kwargs.get("args")
        if config is None:
            model = given[0] if given else kwargs.get("model")
            path = (
                model
                if isinstance(model, str)
                else getattr(getattr(model, "config", None), "_name_or_path", "")
            )
            config = self.config(
                f"{path.rstrip('/').rpartition('/')[2] or 'model'}-{type(self.objective).__name__}"
            )
        if not isinstance(config, self.config):
            raise ConfigError(
                f"{type(self).__name__}: args is a {type(config).__name__}; give a {self.config.__name__}"
            )
        config = self._checked(config)
        if len(given) > place:
            given[place] = config
        else:
            kwargs["args"] = config
        # name -> [sum, elements] since the last log
        self._alignkit: dict[str, dict[str, Tensor]] = {
            "train": {},
            "eval": {},
        }
        super().__init__(*given, **kwargs)

    def _checked(self, config: Any) -> Any:
        return checked_arguments(config, self.objective, type(self).__name__, self.loss_type)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _check_keys(self, inputs: Mapping[str, Any]) -> None:
        unknown = sorted({key for key, value in inputs.items() if value is not None} - self.known)
        if unknown:
            raise DataError(
                f"{type(self).__name__}: the batch holds {', '.join(unknown)}, which this adapter does not read; it trains on "
                "text alone, collated by TRL"
            )

    def _outputs(self, model: Any, feed: Mapping[str, Any]) -> Any:
        """The policy's forward; a mixture of experts is asked for its load-balancing loss, as TRL
        does.
        """
        return model(
            **feed,
            **({"output_router_logits": True} if getattr(self, "aux_loss_enabled", False) else {}),
        )

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
            f"{type(self).__name__}: {type(self.objective).__name__} needs a reference, but TRL holds no reference "
            "model and this batch brings no log-probs of one; use TRL's own data collator, and leave trainer.beta as it is"
        )

    def _tokens(
        self,
        logits: Tensor,
        anchor: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        anchors: dict[str, Tensor],
    ) -> TokenLogps:
        """Figures of the masked tokens, from logits [M, V] of the policy and of the reference
        (None: known or not needed).
        """
        extras = {"entropy": _entropy(logits)}
        statistics = self.objective.plan.statistics
        if statistics:
            wide = [None if t is None else t.float().log_softmax(-1) for t in (logits, anchor)]
            extras |= {name: statistic(*wide, labels) for name, statistic in statistics.items()}
        if anchor is not None:
            anchors = {"reference": _placed(gather_logps(anchor, labels), mask)}
        logps = _placed(gather_logps(logits, labels), mask)
        return TokenLogps(
            logps,
            anchors,
            mask,
            extras={name: _placed(values, mask) for name, values in extras.items()},
        )

    def _reduced(self, out: LossTerms, outputs: Any, rows: int, tokens: Tensor) -> Tensor:
        """The batch's loss: each term's sum over its count, tokens counted over all processes.
        Metrics wait for `log`.
        """
        store = self._alignkit[self._mode]
        for name, values in out.metrics.items():
            entry = torch.stack(
                [
                    values.double().sum(),
                    torch.tensor(float(values.numel()), device=values.device).double(),
                ]
            )
            store[name] = store.get(name, torch.zeros_like(entry)) + entry
        counts: dict[str, Any] = {"rows": rows}
        if any(term.unit == "tokens" for term in out.terms):
            counts["tokens"] = self.accelerator.reduce(tokens.float(), "mean").clamp(min=1)
        loss = sum(term.weight * term.values.sum() / counts[term.unit] for term in out.terms)
        return (
            loss + self.router_aux_loss_coef * outputs.aux_loss
            if getattr(self, "aux_loss_enabled", False)
            else loss
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log with the objective's metrics, averaged over rows or tokens and all processes."""
        mode = self._mode
        store = self._alignkit[mode]
        self._alignkit[mode] = {}
        for name in sorted(store):
            total, count = self.accelerator.reduce(store[name]).tolist()
            logs[name if mode == "train" else f"eval_{name}"] = total / max(count, 1)
        super().log(logs, *args, **kwargs)


class _Pairs(_Adapter):
    """On DPOTrainer: rows are [chosen; rejected]; a micro-batch returns its mean, the Trainer
    divides by the accumulation.
    """

    family = "pair"
    loss_type = "sigmoid"
    config = DPOConfig
    known = PAIR_KEYS

    def _checked(self, config: Any) -> Any:
        if (
            config.precompute_ref_log_probs
            and wants_reference(self.objective)
            and not reads_reference_sums(self.objective)
        ):
            raise ConfigError(
                f"{type(self).__name__}: precompute_ref_log_probs=True keeps one sum per completion, and the objective reads the "
                "reference token by token; set it to False"
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
        # from the end: prompt tuning puts tokens in front
        labels = ids[:, 1:][mask]
        window = slice(-ids.shape[1], -1)
        outputs = self._outputs(model, feed)
        # [M, V]: prompt and padding are left out before the log-softmax
        logits = outputs.logits[:, window][mask]
        anchor = None
        anchors = {}
        if "ref_chosen_logps" in inputs and wants_reference(self.objective):
            anchors["reference"] = _at_first(
                torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]), mask
            )
        elif wants_reference(self.objective):
            with torch.no_grad(), self._reference(model) as reference:
                anchor = reference(**feed).logits[:, window][mask]
        tokens = self._tokens(logits, anchor, labels, mask, anchors)
        rows = torch.arange(len(ids), device=ids.device)
        half = len(ids) // 2
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
    known = GROUP_KEYS

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
                f"{type(self).__name__}: a rollout's loss has no outputs; call compute_loss with return_outputs=False"
            )
        self._check_keys(inputs)
        ids = inputs["completion_ids"]
        mask = (
            inputs["completion_mask"].bool()
            & inputs.get("tool_mask", inputs["completion_mask"]).bool()
        )
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        feed = {
            "input_ids": torch.cat([inputs["prompt_ids"], ids], 1),
            "attention_mask": attention,
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
        old = inputs.get("old_per_token_logps")  # None: the policy has not moved since it sampled
        tokens = replace(
            tokens, behavior=tokens.policy.detach() if old is None else old.where(mask, 0.0)
        )
        advantages = self._factor[self._mode] * inputs["advantages"]
        spread = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)
        # TRL shuffles the groups' members apart
        scores = spread[:, 0]
        groups = torch.arange(len(ids), device=ids.device)
        batch = RolloutBatch(tokens, scores, groups, spread.where(mask, 0.0))
        loss = self._reduced(self.objective.loss(batch), outputs, len(ids), mask.sum())
        return loss / (self.current_gradient_accumulation_steps if self._mode == "train" else 1)


def _place_of_args(cls: type) -> int:
    """Position of the parameter `args` behind `self` in TRL's constructor; scripts may give it
    without its name.
    """
    for parent in cls.__mro__:
        found = inspect.signature(parent.__init__).parameters
        if "args" in found and found["args"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return list(found).index("args") - 1
    raise AssertionError("neither DPOTrainer nor GRPOTrainer takes args")


@torch.no_grad()
def _entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row of logits [M, V] -> [M], a chunk of rows at a time; no gradient."""
    wide = (chunk.float().log_softmax(-1) for chunk in logits.split(CHUNK))
    return torch.cat([-(chunk.exp() * chunk).sum(-1) for chunk in wide])


def _placed(values: Tensor, mask: Tensor) -> Tensor:
    """Figures of the masked tokens [M] at their places, 0 elsewhere: [N, T]."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _at_first(sums: Tensor, mask: Tensor) -> Tensor:
    """Sums per row [N] as token figures [N, T] that add up to them: all on the first masked token."""
    first = (mask.cumsum(-1) == 1) & mask
    return torch.where(first, sums[:, None], sums.new_zeros(()))
