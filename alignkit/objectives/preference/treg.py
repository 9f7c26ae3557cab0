"""T-REG: DPO whose tokens count by what two contrasting prompts think of them."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, Plan, Term, TokenLogps
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.dpo import dpo_loss
from alignkit.tensors import check_same_shape, masked_sum


def treg_loss(
    policy_logps: Tensor, better_logps: Tensor, worse_logps: Tensor, mask: Tensor
) -> Tensor:
    """-sum over tokens of (sigmoid(log p(y_t | better) - log p(y_t | worse)) - 1/2) log pi(y_t):
    [B, T] x 4 -> [B].

    A token's reward is in (-1/2, 1/2), a constant. Zhou et al. 2024, arXiv:2412.02685.
    """
    check_same_shape(
        policy_logps=policy_logps, better_logps=better_logps, worse_logps=worse_logps, mask=mask
    )
    reward = (better_logps - worse_logps).sigmoid() - 0.5
    return -masked_sum(reward.detach() * policy_logps, mask)


class TREG(PairObjective):
    """Token-level reward regularisation (Zhou et al. 2024, arXiv:2412.02685): DPO in whose gradient
    token t of the chosen response weighs 1 + alpha r_t, of the rejected one 1 - alpha r_t.

    r_t comes from the reference, which scores every response once after the text `better` and once
    after `worse`, each put before the whole prompt, and so never changes during training.
    """

    paper: ClassVar[str] = "Zhou et al. 2024, arXiv:2412.02685"
    equation: ClassVar[str] = (
        "L = DPO + alpha stopped(sigmoid(r(l) - r(w))) * -beta sum_t (sigmoid(log ref(y_t | better)/ref(y_t | worse)) - 1/2) "
        "log pi(y_t), over both responses, r = beta log pi/ref"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    alpha: NonNegativeFloat = Field(0.25, description="weight of the token rewards; 0: DPO")
    better: str = Field(
        "Give a helpful, honest and harmless answer.\n",
        description="put before prompts: asks for the good",
    )
    worse: str = Field(
        "Give an unhelpful, false or harmful answer.\n",
        description="put before prompts: asks for the bad",
    )

    @property
    def plan(self) -> Plan:
        prefixes = {"better": self.better, "worse": self.worse}
        return Plan("pair", anchors=("reference", *prefixes), prefixes=prefixes)

    @property
    def surrogate(self) -> bool:
        return True

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen, rejected, *reference = batch.sequence_logps()
        wrong = (self.beta * (rejected - reference[1] - chosen + reference[0])).sigmoid().detach()
        losses = dpo_loss(chosen, rejected, *reference, beta=self.beta)

        # The token rewards count as much as DPO's own gradient does: most where a pair is wrong.
        token_losses = self._token_loss(batch.chosen) + self._token_loss(batch.rejected)
        tokens = Term("tokens", self.beta * wrong * token_losses, weight=self.alpha)
        return batch.rows("dpo", losses, scale=self.beta) + LossTerms([tokens])

    def _token_loss(self, tokens: TokenLogps) -> Tensor:
        return treg_loss(tokens.policy, tokens.get("better"), tokens.get("worse"), tokens.mask)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(alpha=0.5, beta=0.5)]
