"""alignkit's objectives inside TRL's trainers: the only file that imports trl.

    Trainer = as_trl_trainer(HDPO(beta=0.1, alpha=0.9))        # a subclass of DPOTrainer, used
    exactly like it
    Trainer(model=..., args=DPOConfig(...), train_dataset=...).train()

Only the public `compute_loss` and `log` are overridden. Data, generation, rewards, saving and
scheduling stay TRL's.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, RolloutBatch, TokenLogps
from alignkit.errors import ConfigError
from alignkit.integrations.trl_adapter import Adapter
from alignkit.integrations.trl_checks import (
    check_objective,
    check_version,
    checked_pair_arguments,
    checked_rollout_arguments,
    wants_reference,
    warn_of_other_forms,
    warn_of_ratios,
)
from alignkit.integrations.trl_distillation import Distilled, check_distilled
from alignkit.integrations.trl_rollout_metrics import clipped_shares, kl_per_token, policy_loss
from alignkit.integrations.trl_tensors import on_first_token, on_labels, placed
from alignkit.objectives.base import Objective

check_version()  # first, since an unknown release may fail on import with a message of its own
import trl  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer  # noqa: E402

# Older releases have none.
DistillationTrainer = getattr(trl, "DistillationTrainer", None)

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
    GRPOTrainer, DistillationTrainer or a subclass).

    Pair objectives and demonstrations go on DPOTrainer, rollout objectives on GRPOTrainer, whose
    advantages become the objective's own; `Distill(share=1.0)` goes on DistillationTrainer. Raises ConfigError for a release, trainer or objective
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
    adapter = _adapter(base)
    if adapter is Distilled:
        check_distilled(objective, base.__name__)
    else:
        check_objective(objective, adapter.family, base.__name__)
        warn_of_other_forms(objective)

    # TRL writes `_name` and `_paper` into the model card.
    name = type(objective).__name__
    arxiv = re.search(r"arXiv:([\d.]+\d)", objective.paper)
    attributes: dict[str, Any] = {
        "objective": objective,
        "__doc__": type(objective).__doc__,
        "_name": name,
        "_paper": {"title": objective.paper, "id": arxiv[1]} if arxiv else {},
    }
    if adapter is Distilled:
        attributes["config"] = trl.DistillationConfig
    return type(f"{name}{base.__name__}", (adapter, base), attributes)


def _adapter(base: type) -> type[Adapter]:
    """What serves a trainer's batches to objectives. ConfigError for other trainers."""
    if issubclass(base, DPOTrainer):
        return _Pairs
    if issubclass(base, GRPOTrainer):
        return _Groups
    if DistillationTrainer is not None and issubclass(base, DistillationTrainer):
        return Distilled
    raise ConfigError(
        f"as_trl_trainer: base is {base.__name__}; "
        "allowed are DPOTrainer, GRPOTrainer, DistillationTrainer and their subclasses"
    )


class _Pairs(Adapter):
    """On DPOTrainer: rows are [chosen; rejected]; a micro-batch returns its mean, the Trainer
    divides by the accumulation.
    """

    family = "pair"
    loss_type = "sigmoid"
    config = DPOConfig
    known_keys = PAIR_KEYS

    def _checked(self, config: Any) -> Any:
        name = type(self).__name__
        return checked_pair_arguments(super()._checked(config), self.objective, name)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of one micro-batch of TRL's preference collator."""
        self._check_keys(inputs)
        ids, seen, completion = self._cut(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
        )
        mask = completion[:, 1:].bool()
        feed = {"input_ids": ids, "attention_mask": seen, "use_cache": False}
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
        self._keep_of_model(logits, labels, tokens, half)
        self._count_tokens(inputs["attention_mask"])
        losses = self._losses(self.objective.loss(batch), half, mask[:half].sum())
        loss = self._total(losses, outputs)
        return (loss, outputs) if return_outputs else loss

    def _cut(self, *columns: Tensor) -> Sequence[Tensor]:
        """The columns of a batch within `max_length`. TRL 0.29 cuts them in its own loss, later
        releases when they prepare the rows.
        """
        cut = getattr(super(), "_truncate_inputs", None)
        return cut(*columns) if cut else columns

    def _keep_of_model(self, logits: Tensor, labels: Tensor, tokens: TokenLogps, half: int) -> None:
        """TRL's metrics of the model itself, from the `logits` [M, V] and `labels` [M] of the
        tokens; the first `half` of the rows are the chosen completions.
        """
        mean_logits, likeliest = (
            placed(values, tokens.mask) for values in on_labels(logits, labels)
        )
        chosen, rejected = tokens.mask[:half], tokens.mask[half:]
        self._keep(
            {
                "entropy": tokens.extras["entropy"][tokens.mask],
                "logits/chosen": mean_logits[:half][chosen],
                "logits/rejected": mean_logits[half:][rejected],
                "mean_token_accuracy": likeliest[:half][chosen],
            }
        )


class _Groups(Adapter):
    """On GRPOTrainer: TRL's advantages and behaviour log-probs; in
    training the loss is divided by the accumulation.
    """

    family = "rollout"
    loss_type = "grpo"
    config = GRPOConfig
    known_keys = GROUP_KEYS

    # The trainer's own.
    temperature: float
    current_gradient_accumulation_steps: int

    def _checked(self, config: Any) -> Any:
        name = type(self).__name__
        checked = super()._checked(config)
        warn_of_ratios(config, self.objective, name)
        checked, self._factor = checked_rollout_arguments(checked, self.objective, name)
        return checked

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
        feed, mask = self._completions(inputs)
        ids = inputs["completion_ids"]
        labels = ids[mask]
        window = slice(-ids.shape[1] - 1, -1)
        outputs = self._outputs(model, feed)
        logits = outputs.logits[:, window][mask] / self.temperature

        anchor = None
        anchors = {}
        if self.objective.plan.read_by_statistics:
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

        out = self.objective.loss(batch)
        losses = self._losses(out, len(ids), mask.sum())
        self._keep_of_loss(out, losses, tokens)
        loss = self._total(losses, outputs)
        if self._mode == "train":
            return loss / self.current_gradient_accumulation_steps
        return loss

    def _keep_of_loss(self, out: LossTerms, losses: list[Tensor], tokens: TokenLogps) -> None:
        """What TRL logs of its own loss, under its names (docs/trl.md)."""
        self._keep(kl_per_token(self.objective, tokens))
        weight = getattr(self.objective, "entropy_weight", 0.0)
        if weight:
            self._keep({"policy_loss": policy_loss(out, losses)})
        if weight and self._mode == "train":
            self._keep({"entropy_coef": torch.tensor([weight], device=tokens.policy.device)})

        # The least and the most clipped completion of all processes.
        for side, extreme in (("low", torch.min), ("high", torch.max)):
            shares = clipped_shares(self.objective, tokens, out.metrics, side)
            if shares is None:
                continue
            known = self.accelerator.gather(shares)
            known = known[~known.isnan()]
            if len(known):
                name = f"clip_ratio/{side}_{extreme.__name__}"
                self._keep({name: extreme(known).unsqueeze(0)})
