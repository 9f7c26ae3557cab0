"""The policy's pass over rows that are read twice in one step: for their credit, then for the loss.

In between the policy does not move, so one pass serves both. It keeps its graph, which the loss goes
back through, and the credit reads its numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alignkit.batches import Plan
from alignkit.policies.layout import Rows
from alignkit.policies.module import PolicyModule
from alignkit.policies.seen_states import identity

Results = dict[str, Tensor]


class KeptPasses:
    """The passes of a policy that wait for the loss, each for what it was computed from."""

    def __init__(self, policy: PolicyModule) -> None:
        self._policy = policy
        # With the plan, whose functions stay alive, so that no others go by their names.
        self.waiting: dict[tuple[object, ...], tuple[Plan, Results]] = {}
        self._tokens = 0

    def of(self, rows: Rows, plan: Plan, compute: Callable[[], Results], room: int) -> Results:
        """What `compute` gives for these rows, with gradient iff it is enabled: kept or computed.

        Without a gradient the pass is made with one all the same and waits, as long as `room` holds
        the tokens of all that wait. They take the memory of one micro-batch of so many tokens.
        """
        size = rows.input_ids.numel()
        if torch.is_grad_enabled():
            entry = self.waiting.pop(self._key(rows, plan), None)
            if entry is None:
                return compute()
            self._tokens -= size
            return entry[1]
        if self._tokens + size > room or not _repeats(self._policy):
            return compute()

        with torch.enable_grad():
            results = compute()
        self.waiting[self._key(rows, plan)] = (plan, results)
        self._tokens += size
        return {name: values.detach() for name, values in results.items()}

    def clear(self) -> None:
        """Nobody will ask for the passes that still wait."""
        self.waiting.clear()
        self._tokens = 0

    def _key(self, rows: Rows, plan: Plan) -> tuple[object, ...]:
        """What a pass depends on. Whatever moves a parameter raises its version."""
        moves = sum(parameter._version for parameter in self._policy.parameters())
        return (moves, repr(plan.statistics), plan.partition, *identity("policy", rows))


def _repeats(policy: PolicyModule) -> bool:
    """Whether a pass with a gradient computes what one without does: no dropout, and no router,
    whose loss the former adds.
    """
    dropouts = (module.p for module in policy.modules() if isinstance(module, nn.Dropout))
    return policy.router is None and not any(dropouts)
