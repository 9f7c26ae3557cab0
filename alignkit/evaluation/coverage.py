"""How much of a model's law the given answers of preference pairs cover: `alignkit data check --coverage`.

Offline objectives can only be right where the pairs reach: with answers that the reference hardly gives,
a policy may leave it anywhere between them. Song et al. 2024, arXiv:2406.01462 (HyPO).
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles
from alignkit.evaluation.measure import LIVE, evaluation_pair, scored


@dataclass(frozen=True)
class Coverage:
    """Of N pairs under a model. Answers that the model itself drew have a surprise near its entropy
    along them; a surprise far above it says that somebody else wrote them.
    """

    mass: float  # the model's probability of a prompt's distinct answers, mean over prompts
    prompts: int
    surprise: dict[str, float]  # chosen, rejected -> nats per token
    entropy: dict[str, float]  # chosen, rejected -> of the model's laws along them, nats per token

    def lines(self) -> list[str]:
        """As `data check` prints it."""
        shown = [
            f"the answers to a prompt have {self.mass:.2g} of the model's probability (mean of "
            f"{self.prompts} prompts)"
        ]
        for side, surprise in self.surprise.items():
            shown.append(
                f"{side}: {surprise:.3f} nats per token, where the model's own answers would have "
                f"about {self.entropy[side]:.3f}"
            )
        return shown


def pair_coverage(model: str, source: Any, data: DataConfig | None = None) -> Coverage:
    """Coverage of the preference pairs of `source` by a finished model. Raises what loading does."""
    pair = evaluation_pair(model, model)
    bundles, _ = load_bundles(data or DataConfig(), "pair", pair.tokenizer, source=source)
    sums = scored(pair, bundles, LIVE)
    answers = [(bundle.prompt, ids) for bundle in bundles for ids in bundle.completions]

    # Each answer once: the probability of the same text is not there twice.
    by_prompt: dict[tuple[int, ...], dict[tuple[int, ...], float]] = defaultdict(dict)
    for (prompt, ids), logp in zip(answers, sums["logp"], strict=True):
        by_prompt[tuple(prompt.tolist())][tuple(ids.tolist())] = math.exp(logp)
    masses = [sum(given.values()) for given in by_prompt.values()]

    surprise = {}
    entropy = {}
    for place, side in enumerate(("chosen", "rejected")):
        tokens = sum(len(ids) for _, ids in answers[place::2])
        surprise[side] = -sum(sums["logp"][place::2]) / tokens
        entropy[side] = sum(sums["entropy"][place::2]) / tokens
    return Coverage(sum(masses) / len(masses), len(masses), surprise, entropy)
