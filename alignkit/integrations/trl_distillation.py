"""An objective of distillation in TRL's DistillationTrainer, which samples from the student and holds
a teacher. It imports no trl.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.batches import Draw, RolloutBatch, TokenLogps
from alignkit.errors import ConfigError
from alignkit.integrations.trl_adapter import Adapter
from alignkit.integrations.trl_checks import check_instance, default_of
from alignkit.integrations.trl_tensors import entropy, placed
from alignkit.objectives.base import Objective
from alignkit.tensors import gather_logps

KEYS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "num_items_in_batch",
    "tool_mask",
}


def check_distilled(objective: Any, base: str) -> None:
    """ConfigError for what TRL's distillation trainer cannot train: it gives the teacher's whole
    laws on the student's own samples, and neither log-probs of the sampler nor a reward.
    """
    check_instance(objective)
    plan = objective.plan
    laws_of_own_samples = (
        plan.data == "rollout"
        and plan.anchors == ("teacher",)
        and plan.statistics
        and plan.samples == (Draw(),)
        and plan.feedback == "none"
        and plan.epochs * plan.minibatches == 1
        and type(objective).credit is Objective.credit
    )
    if not laws_of_own_samples:
        raise ConfigError(
            f"as_trl_trainer: {type(objective).__name__} with these settings does not learn from "
            f"a teacher's laws on own samples alone, which is all that {base} has; use "
            "Distill(share=1.0, ...), or `alignkit train`"
        )


class Distilled(Adapter):
    """On DistillationTrainer: its samples, its teacher, and one temperature for sampling and loss."""

    family = "rollout"
    loss_type = ""
    known_keys = KEYS

    # The trainer's own.
    temperature: float
    teacher_model: Any

    def _checked(self, config: Any) -> Any:
        if config.beta != default_of(config, "beta"):
            raise ConfigError(
                f"{type(self).__name__}: args.beta is {config.beta}, which would change nothing: "
                f"the divergence is {type(self.objective).__name__}'s; leave it out of the arguments"
            )
        if getattr(config, "use_liger_kernel", False):
            raise ConfigError(
                f"{type(self).__name__}: use_liger_kernel=True replaces the model's forward, which "
                "then gives no logits; set it to False"
            )
        return config

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of one micro-batch of TRL's samples."""
        self._check_keys(inputs)
        feed, mask = self._completions(inputs)
        ids = inputs["completion_ids"]
        labels = ids[mask]
        logits = self._logits(model, feed, mask, nullcontext())
        self.teacher_model.eval()
        theirs = self._logits(self.teacher_model, feed, mask, torch.no_grad())

        # Embeddings of one tokenizer may be padded to different sizes.
        shared = min(logits.shape[-1], theirs.shape[-1])
        ours, theirs = (x[:, :shared].float().log_softmax(-1) for x in (logits, theirs))
        statistics = self.objective.plan.statistics
        extras = {name: statistic(ours, theirs, labels) for name, statistic in statistics.items()}
        extras["entropy"] = entropy(logits)
        tokens = TokenLogps(
            placed(gather_logps(logits, labels), mask),
            {"teacher": placed(gather_logps(theirs, labels), mask)},
            mask,
            extras={name: placed(values, mask) for name, values in extras.items()},
        )

        groups = torch.arange(len(ids), device=ids.device)
        out = self.objective.loss(RolloutBatch(tokens, torch.zeros_like(groups), groups))
        self._keep({**out.metrics, "entropy": tokens.extras["entropy"][mask]})
        count = self._count(inputs, mask)
        loss = sum(term.weight * term.values.sum() / count for term in out.terms)
        return (loss, None) if return_outputs else loss

    def _logits(
        self,
        model: nn.Module,
        feed: dict[str, Any],
        mask: Tensor,
        context: AbstractContextManager[Any],
    ) -> Tensor:
        """Logits of the masked completion tokens [M, V], at the trainer's temperature."""
        with context:
            logits: Tensor = model(**feed).logits
        return logits[:, -mask.shape[1] - 1 : -1][mask] / self.temperature

    def _count(self, inputs: Any, mask: Tensor) -> Tensor:
        """What a sum over this process's tokens is divided by: in training the optimiser step's
        tokens over all processes, as TRL counts them.
        """
        if self._mode == "train" and inputs.get("num_items_in_batch") is not None:
            total: Tensor = inputs["num_items_in_batch"].clamp(min=1.0)
            return total / self.accelerator.num_processes
        return mask.sum().clamp(min=1)
