"""Particles on a tree that can be enumerated, and the randomness of their runs, one by one."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignkit.decoding.value import twists_of_likeliest
from alignkit.policies.tabular import Tree

F64 = torch.float64


class TreeTarget:
    """A tree of responses with a reference, rewards and the tilted law of both."""

    def __init__(self, vocab: int, depth: int, beta: float, seed: int = 0, scale: float = 1.0):
        self.tree = Tree.build(vocab, depth)
        generator = torch.Generator().manual_seed(seed)
        self.theta = torch.randn(self.tree.states, vocab, dtype=F64, generator=generator)
        n = len(self.tree.tokens)
        self.rewards = scale * torch.randn(n, dtype=F64, generator=generator)
        self.beta = beta
        self.depth = depth

        self.logp = self.tree.sequence_logps(self.theta)  # [n]
        self.log_z = torch.logsumexp(self.logp + self.rewards / beta, 0)
        self.log_sigma = self.logp + self.rewards / beta - self.log_z

        # Where each prefix goes with each token: another prefix, or the leaf n (as -1 - n).
        self.after = torch.zeros(self.tree.states, vocab, dtype=torch.int64)
        for leaf, (tokens, prefixes, mask) in enumerate(
            zip(self.tree.tokens.tolist(), self.tree.prefixes.tolist(), self.tree.mask.tolist())
        ):
            length = sum(mask)
            for t in range(length):
                ends = t + 1 == length
                self.after[prefixes[t], tokens[t]] = -1 - leaf if ends else prefixes[t + 1]

    def values(self) -> Tensor:
        """log of the soft value's e^(V / beta) after each prefix and token: [S, V]."""
        twist = torch.zeros_like(self.theta)
        logp = self.theta.log_softmax(-1)
        for state in reversed(range(self.tree.states)):
            for token, after in enumerate(self.after[state].tolist()):
                if after < 0:
                    twist[state, token] = self.rewards[-1 - after] / self.beta
                else:
                    twist[state, token] = torch.logsumexp(logp[after] + twist[after], 0)
        return twist

    def leaf(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The leaf of each response [L]."""
        state = torch.zeros(len(tokens), dtype=torch.int64)
        for t in range(tokens.shape[1]):
            going = (t < lengths) & (state >= 0)
            state = torch.where(going, self.after[state.clamp(min=0), tokens[:, t]], state)
        return -1 - state


class TreeWorld:
    """`World` of a tree: every row is a state. `twist` [S, V] is l of each prefix and token; with
    `by_text` it is asked of unfinished texts alone. A guided proposal sees that of the `candidates`
    likeliest tokens.
    """

    def __init__(
        self,
        target: TreeTarget,
        slots: int,
        twist=None,
        by_text: bool = False,
        candidates: int = 99,
    ):
        self.target = target
        self.state = torch.zeros(slots, dtype=torch.int64)
        self.twist = twist
        self.by_text = by_text
        self.candidates = candidates
        self.stop = torch.tensor([target.tree.vocab - 1])
        self.logp = target.theta.log_softmax(-1)

    def logprobs(self):
        return self.logp[self.state.clamp(min=0)]

    def twists(self):
        twist = self.twist[self.state.clamp(min=0)]
        return twists_of_likeliest(
            self.logprobs(), lambda tokens: twist.gather(-1, tokens), self.candidates
        )

    def twist_of(self, tokens):
        if self.twist is None or self.by_text:
            return None
        return self.twist[self.state.clamp(min=0), tokens]

    def advance(self, tokens):
        self.state = self.target.after[self.state.clamp(min=0), tokens]

    def select(self, rows):
        self.state = self.state[rows]

    def unfinished(self, slots, tokens, lengths):
        if not self.by_text:
            return None
        state = torch.zeros(len(slots), dtype=torch.int64)
        twist = torch.zeros(len(slots), dtype=F64)
        for t in range(int(lengths.max()) if len(lengths) else 0):
            twist = self.twist[state, tokens[:, t]]
            state = self.target.after[state, tokens[:, t]]
        return twist

    def finished(self, slots, tokens, lengths):
        return (self.target.rewards / self.target.beta)[self.target.leaf(tokens, lengths)]


@dataclass
class Script:
    """The noise of one run, written in advance; what it does not say yet branches."""

    choices: list[int]
    options: list[list[float]] = field(default_factory=list)  # probabilities of what was asked
    place: int = 0

    def ask(self, probabilities: list[float]) -> int:
        if self.place == len(self.choices):
            self.choices.append(0)
        self.options.append(probabilities)
        self.place += 1
        return self.choices[self.place - 1]


def enumerated(run):
    """(probability, result) of `run(ask)` for every way in which its questions can be answered."""
    choices: list[int] = []
    while True:
        script = Script(list(choices))
        result = run(script.ask)
        probability = 1.0
        for choice, options in zip(script.choices, script.options):
            probability *= options[choice]
        yield probability, result

        # The next script, as a counter whose digits have as many values as there were options.
        choices = script.choices[: script.place]
        while choices and choices[-1] + 1 == len(script.options[len(choices) - 1]):
            choices.pop()
        if not choices:
            return
        choices[-1] += 1
