"""What is done where an engine samples with other arithmetic than the trainer: its log-probs are
compared with the trainer's, and completions are weighted by the difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.batches import Bundle, LossTerms, Plan, Term, TokenLogps
from alignkit.errors import ResourceError
from alignkit.kl import clamp_log_ratio
from alignkit.tensors import masked_sum


def mismatch(tokens: TokenLogps, accelerator: Accelerator) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, over all ranks: the largest difference
    of a token and the mean KL(engine || trainer) per token. Empty without the engine's log-probs, and
    where no rank has a token.

    It is logged always, because a drift of the two ends in collapse.
    """
    if tokens.behavior is None:
        return {}
    gap = (tokens.policy - tokens.behavior)[tokens.mask].double()
    kl = torch.expm1(gap) - gap  # the k3 estimate of KL(engine || trainer), per token

    largest = torch.cat([gap.new_zeros(1), gap.abs()]).max()  # this rank may have no token
    own = torch.stack([largest, kl.sum(), gap.new_tensor(gap.numel())])
    maxima, sums, counts = accelerator.gather(own[None]).T
    if not counts.any():
        return {}
    return {
        "sampling/logp_difference_max": float(maxima.max()),
        "sampling/mismatch_kl": float(sums.sum() / counts.sum()),
    }


def own_rows(plan: Plan, bundles: Sequence[Bundle]) -> Tensor:
    """The completions that the policy itself drew, whose log-probs `mismatch` compares: indices [n]
    into those of all bundles.
    """
    rows = [
        bundle.rows.get("draw", torch.zeros(len(bundle.completions), dtype=torch.long))
        for bundle in bundles
    ]
    draws = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
    own = torch.tensor([draw.models == {"policy": 1.0} for draw in plan.samples])
    return own[draws].nonzero()[:, 0]


@dataclass(frozen=True)
class Correction:
    """Truncated importance weights (Ionides 2008, J. Comput. Graph. Stat. 17:295) from the engine's
    samples to the trainer's: a completion counts min(cap, trainer's probability over the engine's).
    """

    cap: float
    # KL(engine || trainer) per token above which the engine holds other weights; infinite for the
    # trainer's own model.
    limit: float = math.inf

    def check(self, metrics: Mapping[str, float]) -> None:
        """ResourceError where the result of `mismatch` exceeds the limit. It is the same on all
        ranks, so all of them raise or none does.
        """
        drift = metrics.get("sampling/mismatch_kl", 0.0)  # none where every row was dropped
        if not drift <= self.limit:
            raise ResourceError(
                f"the sampling server's log-probs are {drift:.3g} nats per token from the "
                f"trainer's, more than rollout.max_mismatch {self.limit}: it computes another "
                "model. Check its model and --dtype"
            )

    def weigh(
        self, bundles: Sequence[Bundle], tokens: TokenLogps, accelerator: Accelerator
    ) -> tuple[list[Bundle], dict[str, float]]:
        """The bundles of the N completions in `tokens` with one weight for each (row `importance`),
        and metrics of all ranks: the mean weight and the share of weights at the cap.
        """
        log_ratio = masked_sum(tokens.policy - tokens.get("behavior"), tokens.mask)  # [N]
        ratio = clamp_log_ratio(log_ratio).exp()
        weights = ratio.clamp(max=self.cap)

        parts = weights.cpu().split([len(bundle.completions) for bundle in bundles])
        weighed = [
            replace(bundle, rows={**bundle.rows, "importance": part})
            for bundle, part in zip(bundles, parts, strict=True)
        ]

        capped = ratio > self.cap
        wide = weights.double()
        own = torch.stack([wide.sum(), capped.double().sum(), wide.new_tensor(len(wide))])
        weight_sum, capped_sum, completions = accelerator.reduce(own).tolist()
        metrics = {
            "sampling/importance_mean": weight_sum / max(completions, 1),
            "sampling/importance_capped": capped_sum / max(completions, 1),
        }
        return weighed, metrics


def weighted(out: LossTerms, bundles: Sequence[Bundle]) -> LossTerms:
    """Loss terms times the importance of the completions they are about; unchanged where the
    bundles have none.

    Values of one completion ([N], [N, T]) take its weight, those of one bundle ([B]) the product
    over its completions.
    """
    if not all("importance" in bundle.rows for bundle in bundles):
        return out
    parts = [bundle.rows["importance"] for bundle in bundles]
    per_completion = torch.cat(parts)
    per_bundle = torch.stack([part.prod() for part in parts])

    def times_importance(term: Term) -> Term:
        of_completions = len(term.values) == len(per_completion)
        weights = (per_completion if of_completions else per_bundle).to(term.values)
        columns = [1] * (term.values.dim() - 1)
        return replace(term, values=weights.view(-1, *columns) * term.values)

    return replace(out, terms=[times_importance(term) for term in out.terms])
