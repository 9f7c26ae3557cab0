"""An engine that samples with other arithmetic than the trainer: how far its log-probs are off, and
what is done about it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from alignkit.batches import Bundle, LossTerms, Term, TokenLogps
from alignkit.errors import ResourceError
from alignkit.kl import clamp_log_ratio
from alignkit.tensors import masked_sum


def mismatch(tokens: TokenLogps, accelerator: Accelerator) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, over all ranks: logged always, because
    drift ends in collapse.
    """
    if tokens.behavior is None:
        return {}
    gap = (tokens.policy - tokens.behavior)[tokens.mask].double()
    k3 = torch.expm1(gap) - gap  # KL(engine || trainer), per token
    own = torch.stack(
        [torch.cat([gap.new_zeros(1), gap.abs()]).max(), k3.sum(), gap.new_tensor(gap.numel())]
    )
    largest, total, count = accelerator.gather(own[None]).T
    kl = float(total.sum() / count.sum().clamp(min=1))
    return {"sampling/logp_difference_max": float(largest.max()), "sampling/mismatch_kl": kl}


@dataclass(frozen=True)
class Correction:
    """Truncated importance weights (Ionides 2008, J. Comput. Graph. Stat. 17:295) from the engine's
    samples to the trainer's: a completion counts min(cap, trainer's probability over the engine's).
    """

    cap: float
    limit: float  # KL(engine || trainer) per token above which the engine holds other weights

    def check(self, figures: Mapping[str, float]) -> None:
        """ResourceError where `mismatch` found more than the limit; its figures are global, so all
        ranks agree.
        """
        drift = figures["sampling/mismatch_kl"]
        if not drift <= self.limit:
            raise ResourceError(
                f"the sampling server's log-probs are {drift:.3g} nats per token from the trainer's, more than "
                f"rollout.max_mismatch {self.limit}: it computes another model. Check its model and --dtype"
            )

    def weigh(
        self, bundles: Sequence[Bundle], tokens: TokenLogps, accelerator: Accelerator
    ) -> tuple[list[Bundle], dict[str, float]]:
        """The bundles of the N completions in `tokens` with one weight for each (row `importance`),
        and figures of all ranks.
        """
        ratio = clamp_log_ratio(
            masked_sum(tokens.policy - tokens.get("behavior"), tokens.mask)
        ).exp()
        weights = ratio.clamp(max=self.cap)
        capped = ratio > self.cap
        sums = torch.stack(
            [
                weights.double().sum(),
                capped.double().sum(),
                weights.new_tensor(len(weights)).double(),
            ]
        )
        total, beyond, count = accelerator.reduce(sums).tolist()
        parts = weights.cpu().split([len(bundle.completions) for bundle in bundles])
        weighed = [
            replace(b, rows={**b.rows, "importance": part})
            for b, part in zip(bundles, parts, strict=True)
        ]
        figures = {
            "sampling/importance_mean": total / max(count, 1),
            "sampling/importance_capped": beyond / max(count, 1),
        }
        return weighed, figures


def weighted(out: LossTerms, bundles: Sequence[Bundle]) -> LossTerms:
    """Loss terms times the importance of the completions they are about; without importance as they
    are.

    Values of one completion ([N], [N, T]) take its weight, those of one bundle ([B]) the product
    over its completions.
    """
    if not all("importance" in bundle.rows for bundle in bundles):
        return out
    parts = [bundle.rows["importance"] for bundle in bundles]
    single = torch.cat(parts)
    joint = torch.stack([part.prod() for part in parts])

    def term(term: Term) -> Term:
        weights = single if len(term.values) == len(single) else joint
        weights = weights.to(term.values).view(-1, *[1] * (term.values.dim() - 1))
        return replace(term, values=weights * term.values)

    return replace(out, terms=[term(t) for t in out.terms])
