"""Nash-MD: policy gradient against a mixture of the policy and the reference."""

from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term
from alignkit.errors import ShapeError
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape, masked_sum, reverse_cumsum

Mixture = Annotated[float, Field(ge=0, le=1)]


def mixture_weights(mixture: float) -> dict[str, float]:
    """The weights of a draw from the geometric mixture of policy and reference, `mixture` on the
    reference; none where the policy samples alone.
    """
    return {"policy": 1 - mixture, "reference": mixture} if mixture else {}


def nash_md_loss(
    policy_logps: Tensor, reference_logps: Tensor, preference: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """Nash-MD-PG surrogate: log-probs and mask [B, T], preference [B] = P(y beats the opponent) ->
    [B], summed over the mask.

    Its expected gradient is that of -(P(pi beats the opponent) - beta KL(pi || ref)). Each token is
    charged with its own log-ratio and those of the tokens after it, which it helped to cause
    (reward-to-go); its own alone gives a wrong gradient. Munos et al. 2023, arXiv:2312.00886,
    section 7; no gradient flows through the preference or the opponent.
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps, mask=mask)
    if preference.shape != policy_logps.shape[:1]:
        shapes = f"preference {list(preference.shape)} with log-probs {list(policy_logps.shape)}"
        raise ShapeError(f"nash_md_loss: {shapes}; want one preference per row, [B] with [B, T]")
    log_ratio = (policy_logps - reference_logps).detach()
    kl_to_go = reverse_cumsum(log_ratio.where(mask, log_ratio.new_zeros(())))
    credit = preference.detach().unsqueeze(-1) - 0.5 - beta * kl_to_go
    return -masked_sum(credit * policy_logps, mask)


class NashPolicyGradient(Objective):
    """One sample against one opponent; objectives differ in who that is."""

    beta: PositiveFloat = Field(
        0.1, description="strength of the reverse KL to the reference, per completion"
    )

    @property
    def surrogate(self) -> bool:
        """True: the KL credit is a stopped function of the policy's log-probs."""
        return True

    def loss(self, batch: GameBatch) -> LossTerms:
        (tokens,) = batch.completions
        preference = batch.preference[:, 0]
        losses = nash_md_loss(
            tokens.policy, tokens.reference, preference, tokens.mask, beta=self.beta
        )
        kl = masked_sum(tokens.log_ratio.detach(), tokens.mask)
        metrics = {
            "rewards/probabilities": preference,
            "kl": kl,
            "logps/policy": tokens.sequence().detach(),
        }
        return LossTerms([Term("nash_md", losses)], metrics)


class NashMD(NashPolicyGradient):
    """Nash learning by mirror descent, policy-gradient form (Munos
    et al. 2023, arXiv:2312.00886, section 7).

    The opponent mixes next-token distributions, q proportional to pi^(1 - mixture) ref^mixture at
    every token. A constant mixture ends at the best response to itself, near but not at the
    equilibrium; 0 is plain self-play.
    """

    paper: ClassVar[str] = "Munos et al. 2023, arXiv:2312.00886, section 7"
    equation: ClassVar[str] = (
        "grad L = -grad log pi(y) * (P(y > y') - 1/2 - beta log pi(y)/ref(y)), y ~ pi, y' ~ mixture"
    )

    mixture: Mixture = Field(
        0.125,
        description="weight of the reference in the opponent; 0 = the policy, 1 = the reference",
    )

    @property
    def plan(self) -> Plan:
        opponent = Draw(1, weights=mixture_weights(self.mixture), scored=False)
        return Plan("game", samples=(Draw(1), opponent), feedback="pairwise")
