"""alignkit's objectives inside TRL's trainers: the only file that imports trl.

    Trainer = as_trl_trainer(HDPO(beta=0.1, alpha=0.9))        # a subclass of DPOTrainer, used exactly like it
    Trainer(model=..., args=DPOConfig(...), train_dataset=...).train()

Only the public `compute_loss` and `log` are overridden. Data, generation, rewards, saving and scheduling stay TRL's.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer

from alignkit.batches import LossTerms, PairBatch, RolloutBatch, TokenLogps
from alignkit.errors import ConfigError, DataError
from alignkit.objectives.base import Objective
from alignkit.tensors import gather_logps

SUPPORTED = "trl>=0.29.1,<2, not 1.15.0 on a machine without a GPU"
ANY_VERSION = "ALIGNKIT_ANY_TRL"  # environment: try an untested version
PAIR_KEYS = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
GROUP_KEYS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
GROUP_KEYS |= {"old_per_token_logps", "ref_per_token_logps", "tool_mask", "rewards", "prompts", "completions"}


def as_trl_trainer(objective: Objective, base: type = DPOTrainer) -> type:
    """A trainer class that minimises `objective`: a named subclass of `base` (DPOTrainer, GRPOTrainer or a subclass).

    Pair objectives go on DPOTrainer, rollout objectives on GRPOTrainer (TRL's advantages, spread over the tokens). Raises
    ConfigError for a version, trainer or objective that does not fit.
    """
    check_version()
    if not isinstance(objective, Objective):
        raise ConfigError(f"as_trl_trainer: objective is a {type(objective).__name__}; give an instance such as DPO(beta=0.1)")
    if hasattr(base, "UnslothTrainer") or "unsloth" in f"{base.__module__}{getattr(base, '__name__', '')}".lower():
        raise ConfigError("as_trl_trainer: this trainer is patched by unsloth, which replaces compute_loss; import trl first")
    family, plan = ("pair" if issubclass(base, DPOTrainer) else "rollout"), objective.plan
    if not issubclass(base, DPOTrainer | GRPOTrainer):
        raise ConfigError(f"as_trl_trainer: base is {base.__name__}; allowed are DPOTrainer, GRPOTrainer and their subclasses")
    if plan.data != family and not (family == "pair" and plan.data == "sequence"):
        fitting = {"pair": "DPOTrainer", "sequence": "DPOTrainer", "rollout": "GRPOTrainer"}.get(plan.data)
        hint = f"use base={fitting}" if fitting else "train it with alignkit's own loop (`alignkit train`)"
        raise ConfigError(
            f"as_trl_trainer: {type(objective).__name__} learns from {plan.data} data, not {base.__name__}'s; {hint}"
        )
    if plan.values or plan.coupled or set(plan.anchors) - {"reference"} or _credits_kl(objective):
        raise ConfigError(
            f"as_trl_trainer: {type(objective).__name__} needs what {base.__name__} cannot give (a value head, the whole step at "
            "once, a second anchor, advantages that carry the KL: set kl_credit=token or anchor=behavior); use `alignkit train`"
        )
    mixin = _Pairs if family == "pair" else _Groups
    return type(f"{type(objective).__name__}{base.__name__}", (mixin, base), {"objective": objective})


def check_version() -> None:
    """Raise ConfigError for a TRL release that was not tried."""
    found = version("trl")
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    broken = numbers == (1, 15, 0) and not torch.cuda.is_available()
    if ((0, 29, 1) <= numbers < (2,) and not broken) or os.environ.get(ANY_VERSION):
        return
    raise ConfigError(f"trl {found} is installed; supported is {SUPPORTED} (set {ANY_VERSION}=1 to try it all the same)")


def _credits_kl(objective: Objective) -> bool:
    """Whether the objective's advantages change with the reference: TRL's are made from the rewards alone."""
    if objective.plan.data != "rollout" or objective.plan.values:
        return False
    mask = torch.ones(4, 2, dtype=torch.bool)
    found = []
    for gap in (0.0, 1.0):
        extras = {name: torch.full((4, 2), gap) for name in objective.plan.statistics}
        tokens = TokenLogps(
            torch.zeros(4, 2), {"reference": torch.tensor([[0.0, gap]] * 2 + [[gap, gap]] * 2)}, mask, extras=extras
        )
        rollout = RolloutBatch(tokens, torch.tensor([0.0, 1, 0, 1]), torch.zeros(4, dtype=torch.long))
        found.append(objective.credit(rollout, objective.init_state())[0].advantages)
    return not torch.equal(found[0], found[1])


class _Adapter:
    """What both families share: checked arguments, reference forwards, reduction and metrics."""

    objective: ClassVar[Objective]
    known: ClassVar[set[str]]

    def __init__(self, *args: Any, **kwargs: Any):
        if len(args) > 2 or (len(args) == 2 and not hasattr(args[1], "learning_rate")):
            raise ConfigError(f"{type(self).__name__}: give everything after the model by keyword (args=..., train_dataset=...)")
        config = kwargs.pop("args", None) or (args[1] if len(args) == 2 else None)
        self._alignkit: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        if config is not None:
            config = self._checked(copy.copy(config))
        super().__init__(*args[:1], args=config, **kwargs)

    def _checked(self, config: Any) -> Any:
        """The trainer's arguments with one beta; refuses what would be ignored."""
        name, default = type(self).__name__, type(config).__dataclass_fields__["beta"].default
        beta = getattr(self.objective, "beta", default) if self._wants_reference() else 0.0
        if config.beta not in (default, beta):
            raise ConfigError(
                f"{name}: args.beta is {config.beta}, the objective's is {beta}; leave args.beta out, or make them equal"
            )
        config.beta = beta
        if getattr(config, "use_liger_kernel", False):
            raise ConfigError(f"{name}: use_liger_kernel=True computes TRL's own loss; set it to False")
        loss_type = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type]
        if loss_type != [self.loss_type] and loss_type != [type(config).__dataclass_fields__["loss_type"].default]:
            raise ConfigError(f"{name}: loss_type={config.loss_type!r} would be ignored; the objective decides, leave it out")
        config.loss_type = [self.loss_type] if isinstance(config.loss_type, list) else self.loss_type
        return config

    def _wants_reference(self) -> bool:
        return "reference" in self.objective.plan.anchors or bool(self.objective.plan.statistics)

    def _check_keys(self, inputs: Mapping[str, Any]) -> None:
        unknown = {key for key, value in inputs.items() if value is not None} - self.known
        if unknown:
            raise DataError(
                f"{type(self).__name__}: the batch holds {', '.join(sorted(unknown))}, which this adapter does not read"
            )

    @contextmanager
    def _reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference in TRL's order: its own model, the adapter called "ref", the model without its adapter."""
        if getattr(self, "ref_model", None) is not None:
            yield self.ref_model
            return
        inner = self.accelerator.unwrap_model(model)
        if not hasattr(inner, "peft_config"):
            raise ConfigError(f"{type(self).__name__}: TRL made no reference model; leave args.beta to the objective")
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

    def _statistics(self, policy: Tensor, anchor: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """The plan's statistics on [M, V] logits of both models: name -> [M]."""
        wide = [None if t is None else t.float().log_softmax(-1) for t in (policy, anchor)]
        return {name: fn(wide[0], wide[1], labels) for name, fn in self.objective.plan.statistics.items()}

    def _reduced(self, out: LossTerms, counts: Mapping[str, int]) -> Tensor:
        """The batch's loss: each term's sum over its count. Metrics wait for `log`."""
        store = self._alignkit["train" if self.model.training else "eval"]
        for name, values in out.metrics.items():
            entry = torch.stack([values.double().sum(), torch.tensor(float(values.numel()), device=values.device).double()])
            store[name] = store.get(name, torch.zeros_like(entry)) + entry
        return sum(term.weight * term.values.sum() / max(1, counts[term.unit]) for term in out.terms)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log with the objective's metrics, averaged over rows or tokens and all processes."""
        mode = "train" if self.model.training else "eval"
        store, self._alignkit[mode] = self._alignkit[mode], {}
        own = {}
        for name in sorted(store):
            total, count = self.accelerator.reduce(store[name]).tolist()
            own[name if mode == "train" else f"eval_{name}"] = total / max(count, 1)
        logs.update(own)
        super().log(logs, *args, **kwargs)


class _Pairs(_Adapter):
    """On DPOTrainer: rows are [chosen; rejected]; a micro-batch returns its mean, the Trainer divides by the accumulation."""

    known, loss_type = PAIR_KEYS, "sigmoid"

    def _checked(self, config: Any) -> Any:
        config = super()._checked(config)
        if self.objective.plan.statistics and config.precompute_ref_log_probs:
            raise ConfigError(
                f"{type(self).__name__}: it reads the reference's whole vocabulary; precompute_ref_log_probs keeps sums only"
            )
        return config

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        self._check_keys(inputs)
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        feed = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "use_cache": False}
        outputs = model(**feed)
        labels = ids[:, 1:][mask]
        logits = outputs.logits[:, :-1][mask]  # [M, V]: prompt and padding are left out before the log-softmax
        anchors, anchor_logits = {}, None
        if self._wants_reference():
            if "ref_chosen_logps" in inputs and not self.objective.plan.statistics:
                anchors["reference"] = _at_first(torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]), mask)
            else:
                with torch.no_grad(), self._reference(model) as reference:
                    anchor_logits = reference(**feed).logits[:, :-1][mask]
                anchors["reference"] = _placed(gather_logps(anchor_logits, labels), mask)
        extras = {k: _placed(v, mask) for k, v in self._statistics(logits, anchor_logits, labels).items()}
        tokens = TokenLogps(_placed(gather_logps(logits, labels), mask), anchors, mask, extras=extras)
        half = len(ids) // 2
        rows = torch.arange(len(ids), device=ids.device)
        batch = PairBatch(tokens.select(rows[:half]), tokens.select(rows[half:]))
        loss = self._reduced(self.objective.loss(batch), {"rows": half, "tokens": int(mask[:half].sum())})
        return (loss, outputs) if return_outputs else loss


class _Groups(_Adapter):
    """On GRPOTrainer: TRL's advantages and behaviour log-probs; in training the loss is divided by the accumulation."""

    known, loss_type = GROUP_KEYS, "grpo"

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if return_outputs:
            raise ConfigError("GRPOTrainer does not return outputs; call compute_loss with return_outputs=False")
        self._check_keys(inputs)
        labels = inputs["completion_ids"]
        mask = inputs["completion_mask"].bool() & inputs.get("tool_mask", inputs["completion_mask"]).bool()
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        feed = {"input_ids": torch.cat([inputs["prompt_ids"], labels], 1), "attention_mask": attention, "use_cache": False}

        def logits(module: Any) -> Tensor:
            return module(**feed).logits[:, -labels.shape[1] - 1 : -1][mask] / self.temperature

        policy = logits(model)
        anchors, anchor = {}, None
        if self.objective.plan.statistics:
            with torch.no_grad(), self._reference(model) as reference:
                anchor = logits(reference)
            anchors["reference"] = _placed(gather_logps(anchor, labels[mask]), mask)
        elif self._wants_reference():
            anchors["reference"] = inputs["ref_per_token_logps"].where(mask, 0.0)
        logps = _placed(gather_logps(policy, labels[mask]), mask)
        old = inputs.get("old_per_token_logps")
        behavior = logps.detach() if old is None else old.where(mask, 0.0)
        extras = {k: _placed(v, mask) for k, v in self._statistics(policy, anchor, labels[mask]).items()}
        tokens = TokenLogps(logps, anchors, mask, behavior, extras)
        advantages = inputs["advantages"]
        spread = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logps)
        groups = torch.arange(len(labels), device=labels.device)
        batch = RolloutBatch(tokens, advantages if advantages.dim() == 1 else advantages[:, 0], groups, spread.where(mask, 0.0))
        loss = self._reduced(self.objective.loss(batch), {"rows": len(labels), "tokens": int(mask.sum())})
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)


def _placed(values: Tensor, mask: Tensor) -> Tensor:
    """Figures of the masked tokens [M] at their places, 0 elsewhere: [N, T]."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _at_first(sums: Tensor, mask: Tensor) -> Tensor:
    """Sums per row [N] as token figures [N, T] that add up to them: all on the first masked token."""
    first = (mask.cumsum(-1) == 1) & mask
    return torch.where(first, sums[:, None], sums.new_zeros(()))
