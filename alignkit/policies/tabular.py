"""Policies small enough to enumerate: one softmax per prefix over
a tiny vocabulary; with depth 1 a flat softmax.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.batches import Plan, TokenLogps


@dataclass(frozen=True)
class Tree:
    """All n responses of at most `depth` tokens.

    With `eos` the last vocabulary entry ends a response early.
    """

    tokens: Tensor  # [n, depth] int64, 0 after the end
    mask: Tensor  # [n, depth] bool
    prefixes: Tensor  # [n, depth] int64, which row of theta decides the token; 0 after the end
    states: int  # S, number of prefixes
    vocab: int

    @classmethod
    def build(cls, vocab: int, depth: int, *, eos: bool = True) -> "Tree":
        """Enumerate the responses; depth 1 is a bandit with `vocab` arms."""
        # A path lists (prefix, token) for each of its tokens; a prefix is a row of theta.
        unfinished: list[list[tuple[int, int]]] = [[]]
        finished: list[list[tuple[int, int]]] = []
        states = 0
        for t in range(depth):
            longer = []
            for path in unfinished:
                longer += [[*path, (states, token)] for token in range(vocab)]
                states += 1
            unfinished = []
            for path in longer:
                ends = t == depth - 1 or (eos and path[-1][1] == vocab - 1)
                (finished if ends else unfinished).append(path)

        padded = torch.tensor([path + [(0, 0)] * (depth - len(path)) for path in finished])
        lengths = torch.tensor([len(path) for path in finished])
        return cls(
            tokens=padded[..., 1],
            mask=torch.arange(depth) < lengths[:, None],
            prefixes=padded[..., 0],
            states=states,
            vocab=vocab,
        )

    def logprobs(self, theta: Tensor) -> Tensor:
        """The whole distribution at each position: [S, V] -> [n, depth, V]."""
        return theta.log_softmax(-1)[self.prefixes]

    def logps(self, theta: Tensor) -> Tensor:
        """Log-prob of each token, 0 after the end: [S, V] -> [n, depth]."""
        taken = self.logprobs(theta).gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.mask, taken, taken.new_zeros(()))

    def sequence_logps(self, theta: Tensor) -> Tensor:
        """Log-prob of each response: [S, V] -> [n]; they sum to 1."""
        return self.logps(theta).sum(-1)

    def conditionals(self, response_logps: Tensor) -> Tensor:
        """The policy [S, V] (log-probs) whose responses have log-probs
        `response_logps` [n] up to a constant.
        """
        flat = (self.prefixes * self.vocab + self.tokens)[self.mask]
        relative = (response_logps - response_logps.max()).exp()  # [n], no overflow
        weights = relative.unsqueeze(-1).expand_as(self.mask)[self.mask]
        total = weights.new_zeros(self.states * self.vocab).index_add(0, flat, weights)
        return total.reshape(self.states, self.vocab).log().log_softmax(-1)

    def token_logps(self, theta: Tensor, anchors: Mapping[str, Tensor], plan: Plan) -> TokenLogps:
        """All responses as an objective sees them, with the plan's statistics under the first
        anchor: [S, V] -> [n, depth].
        """
        policy = self.logprobs(theta)
        anchor = self.logprobs(anchors[plan.anchors[0]]).flatten(0, 1) if plan.anchors else None

        extras = {}
        if plan.values:  # of a head that has learned nothing
            extras["values"] = torch.zeros(self.mask.shape, dtype=policy.dtype)
        for name, statistic in plan.statistics.items():
            flat = statistic(policy.flatten(0, 1), anchor, self.tokens.flatten())
            values = flat.reshape(self.mask.shape)
            extras[name] = torch.where(self.mask, values, values.new_zeros(()))

        anchor_logps = {name: self.logps(anchors[name]).detach() for name in plan.anchors}
        return TokenLogps(self.logps(theta), anchor_logps, self.mask, extras=extras)
