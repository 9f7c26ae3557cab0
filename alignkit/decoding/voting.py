"""When to stop asking, and whom to ask next: rules on the answers that were drawn so far.

An answer is anything hashable that stands for its meaning: a number, a normalised text, the number of
a cluster. None abstains.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from alignkit.errors import ConfigError


def semantic_entropy(answers: Sequence[Hashable | None]) -> float:
    """Entropy in nats of the meanings among the answers; 0 where all mean the same.

    Answers that abstain each count as a meaning of their own, so that silence is no agreement.
    Farquhar et al. 2024 (Nature 630), with the shares of the meanings. ConfigError without answers.

    >>> round(semantic_entropy(["7", "7", "9", "9"]), 4)
    0.6931
    """
    if not answers:
        raise ConfigError("semantic_entropy: there is no answer")
    counts = [*Counter(one for one in answers if one is not None).values()]
    counts += [1] * sum(one is None for one in answers)
    shares = [count / len(answers) for count in counts]
    return max(0.0, -sum(share * math.log(share) for share in shares))


def answers_needed(answers: Sequence[Hashable | None], *, least: int, threshold: float) -> int:
    """How many of the answers, in the order drawn, are needed: the first number of at least `least`
    whose semantic entropy is at most `threshold` nats; all of them where there is none.

    ConfigError for `least` below 2: one answer always agrees with itself.
    """
    if least < 2:
        raise ConfigError(f"answers_needed: least is {least}; it must be 2 or more")
    for count in range(least, len(answers) + 1):
        if semantic_entropy(answers[:count]) <= threshold:
            return count
    return len(answers)


@dataclass(frozen=True)
class Switched:
    """The answer that was taken, and which models were asked for it, in order."""

    answer: Hashable | None
    asked: tuple[str, ...]


def model_switch(
    answers: Mapping[str, Sequence[Hashable | None]], *, agreement: float = 1.0
) -> Switched:
    """ModelSwitch: the models are asked in order, each for several answers, until one of them gives
    the same answer at least `agreement` of the time. Where none does, all answers vote, each model's
    with the weight 1 - (its semantic entropy) / log K, so that a model that contradicts itself counts
    less; with equal weights the answer that came first wins.

    Chen et al. 2025, arXiv:2504.00762; the weight is our reading of it. ConfigError without answers
    or for `agreement` outside (0, 1].

    >>> model_switch({"small": ["7", "9"], "large": ["9", "9"]})
    Switched(answer='9', asked=('small', 'large'))
    """
    if not answers or not all(answers.values()) or not 0 < agreement <= 1:
        raise ConfigError(
            f"model_switch: answers of {list(answers)} and agreement {agreement}; every model needs "
            "answers, and the agreement lies in (0, 1]"
        )
    votes: Counter[Hashable] = Counter()
    for place, (_, given) in enumerate(answers.items(), start=1):
        known = Counter(one for one in given if one is not None)
        if known:
            best, count = known.most_common(1)[0]
            if count >= agreement * len(given):
                return Switched(best, tuple(answers)[:place])

        spread = math.log(len(given)) if len(given) > 1 else 1.0
        weight = 1 - semantic_entropy(given) / spread
        for one, count in known.items():
            votes[one] += weight * count  # type: ignore[assignment]
    chosen = votes.most_common(1)[0][0] if votes else None
    return Switched(chosen, tuple(answers))
