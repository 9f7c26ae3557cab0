"""What an objective asks of the loop: data, samples, statistics, anchors. Everything the loop knows
of an objective.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

# (policy_logprobs [C, V], anchor_logprobs [C, V] or None, labels [C]) -> [C], evaluated inside one
# head chunk
Statistic = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Family = Literal["sequence", "pair", "ranked", "labelled", "rollout", "game"]


@dataclass(frozen=True)
class Draw:
    """`n` completions per prompt (None: the recipe's rollout.completions) from `source` (policy,
    reference, an anchor), or from the token-level mixture with weight `mix` on the reference.
    """

    n: int | None = None
    source: str = "policy"
    mix: float = 0.0
    scored: bool = True  # False: an opponent, judged against and then set aside


@dataclass(frozen=True)
class Plan:
    """What an objective needs from the loop. Everything the loop knows of an objective is in here."""

    data: Family
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    anchors: tuple[str, ...] = ("reference",)
    samples: tuple[Draw, ...] = ()
    feedback: Literal["none", "reward", "pairwise", "table"] = "none"
    values: bool = False
    epochs: int = 1
    minibatches: int = 1
    coupled: bool = False
    mismatched: bool = False
    update: Literal["gradient", "extragradient"] = "gradient"
    # numbers that the network gives for a whole completion, instead of log-probs of its tokens
    outputs: int = 0
    # name of an anchor -> a text: the reference's log-probs of the completions (fixed data) with
    # the text before the prompt
    prefixes: Mapping[str, str] = field(default_factory=dict)
    joined: bool = False  # these read both completions of a pair at once, in either order
