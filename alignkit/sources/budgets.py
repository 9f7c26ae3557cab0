"""Sample budgets: prompts get as many completions as their gradients are uncertain. Pilot samples say
how often each prompt is answered well; the rest of the step's samples goes where it lowers the
variance most.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from alignkit.batches import Bundle
from alignkit.config.allocation import AllocateConfig
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import ConfigError
from alignkit.rollout.protocol import Continuation, Sample, Sampler
from alignkit.sources.ahead import Request
from alignkit.sources.base import explained_numerics
from alignkit.sources.bundle_io import joined
from alignkit.sources.scoring import Answers, scores_of

# (positions of prompts in the order, their samples) -> scored bundles, None without a score
Score = Callable[[Sequence[int], Sequence[Sequence[Sample]]], list[Bundle | None]]

# bundles -> the norm of each completion's gradient
Norms = Callable[[Sequence[Bundle]], list[list[float]]]


def sample_budgets(
    pass_rates: Sequence[float],
    total: int,
    *,
    alpha: float = 1e-3,
    beta: float = 2.0,
    norms: Sequence[float] | None = None,
    least: int = 0,
) -> list[int]:
    """How many of `total` samples each prompt gets, at least `least` of them.

    The numbers are in proportion to G / sqrt(p + alpha / p^(beta - 1)), with p the prompt's pass
    rate and G its entry in `norms`, the mean norm of a good sample's gradient (default 1); a prompt
    with p or G of 0 gets no more than `least`. At alpha 0 they minimise sum of G^2 / (p n), the
    variance of the step's gradient. Integers by the largest residual; their sum is `total`.

    ConfigError where `total` is less than `least` for each, for a rate outside [0, 1], and for a norm
    that is negative or not finite. Source: GVM, Yao et al. 2025, arXiv:2505.02391.
    """
    if total < least * len(pass_rates):
        raise ConfigError(
            f"{total} samples are less than {least} for each of {len(pass_rates)} prompts"
        )
    if not all(0 <= rate <= 1 for rate in pass_rates):
        raise ConfigError(f"pass rates should be between 0 and 1; got {list(pass_rates)}")

    sizes = [1.0] * len(pass_rates) if norms is None else list(norms)
    if not all(0 <= size < math.inf for size in sizes):
        raise ConfigError(f"norms of gradients should be finite and not negative; got {sizes}")
    weights = [
        size / math.sqrt(rate + alpha / rate ** (beta - 1)) if rate > 0 else 0.0
        for rate, size in zip(pass_rates, sizes, strict=True)
    ]
    if not any(weights):
        weights = [1.0] * len(weights)

    # Whoever would get less than `least` gets that, and the others share what is left.
    sharing = [i for i, weight in enumerate(weights) if weight > 0]
    while True:
        left = total - least * (len(weights) - len(sharing))
        scale = left / sum(weights[i] for i in sharing)
        enough = [i for i in sharing if weights[i] * scale >= least]
        if len(enough) == len(sharing):
            break
        sharing = enough

    counts = [least] * len(weights)
    for i in sharing:
        counts[i] = int(weights[i] * scale)
    residuals = sorted(sharing, key=lambda i: counts[i] - weights[i] * scale)
    for i in residuals[: total - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class Allocation:
    """Gives the prompts of a rollout their numbers of completions, `mean` on average."""

    config: AllocateConfig
    mean: int  # completions per prompt
    room: int  # most new tokens of a completion
    norms: Norms | None = None  # None: all gradients count as alike

    def completed(
        self,
        pilot: Request,
        answers: Answers,
        bundles: Sequence[Sequence[Bundle]],
        sampler: Sampler,
        score: Score,
        accelerator: Accelerator,
    ) -> tuple[Answers, list[list[Bundle]], dict[str, float]]:
        """The pilot's answers and scored bundles of this rank's prompts, with those beside them that
        each prompt gets; and what to log of it.
        """
        counts, metrics = self._counts(pilot.positions, bundles, accelerator)
        with raise_on_all_ranks(accelerator), explained_numerics():
            rest = self._rest(pilot, counts, sampler)
            together = _with_rest(pilot.positions, bundles, rest, score)
        every: list[list[Any]] = [[*first, *more] for first, more in zip(answers, rest)]
        return every, together, metrics

    def _counts(
        self,
        positions: Sequence[int],
        bundles: Sequence[Sequence[Bundle]],
        accelerator: Accelerator,
    ) -> tuple[dict[int, int], dict[str, float]]:
        """Completions of each of this rank's prompts, by position, from the scores of all ranks."""
        with raise_on_all_ranks(accelerator):
            sizes = self._gradients(bundles)
        rated = map(self._pass_rate, bundles)
        everyone = sorted(gather_object(list(zip(positions, rated, sizes, strict=True))))
        rates = [rate for _, rate, _ in everyone]
        counts = sample_budgets(
            rates,
            self.mean * len(rates),
            alpha=self.config.alpha,
            beta=self.config.power,
            norms=[size for _, _, size in everyone],
            least=self.config.pilot,
        )
        metrics = {
            "rollout/pilot_pass_rate": sum(rates) / len(rates),
            "rollout/never_passed": sum(rate == 0 for rate in rates) / len(rates),
            "rollout/most_completions": float(max(counts)),
        }
        by_position = {position: count for (position, _, _), count in zip(everyone, counts)}
        return by_position, metrics

    def _pass_rate(self, bundles: Sequence[Bundle]) -> float:
        scores = scores_of(bundles)
        return 0.0 if scores is None else float((scores > self.config.threshold).double().mean())

    def _gradients(self, bundles: Sequence[Sequence[Bundle]]) -> list[float]:
        """The mean norm of the gradients of each prompt's accepted pilots; 1 where all count alike,
        0 for a prompt without one.
        """
        if self.norms is None:
            return [1.0] * len(bundles)
        accepted = [[part for b in row if (part := self._accepted(b))] for row in bundles]
        norms = iter(self.norms([bundle for row in accepted for bundle in row]))
        by_prompt = [[norm for _ in row for norm in next(norms)] for row in accepted]
        return [sum(row) / len(row) if row else 0.0 for row in by_prompt]

    def _accepted(self, bundle: Bundle) -> Bundle | None:
        """The completions with a score above the threshold, without what is known of them."""
        scores = bundle.rows["score"].tolist()
        passed = [k for k, score in enumerate(scores) if score > self.config.threshold]
        if not passed:
            return None
        return replace(
            bundle,
            completions=[bundle.completions[k] for k in passed],
            masks=[bundle.masks[k] for k in passed],
            rows={},
            tokens={},
        )

    def _rest(self, pilot: Request, counts: dict[int, int], sampler: Sampler) -> list[list[Sample]]:
        """What is left to be drawn: the samples that one draw of all of them would have given, since
        noise belongs to the number of a completion.
        """
        wanted = [
            (index, number)
            for index, position in enumerate(pilot.positions)
            for number in range(self.config.pilot, counts[position])
        ]
        samples: list[list[Sample]] = [[] for _ in pilot.positions]
        # A process that wants none asks as well: it takes part in the forwards of sharded models.
        drawn = sampler.sample(
            [pilot.prompts[index] for index, _ in wanted],
            replace(pilot.draw, n=1),
            step=pilot.clock,
            prompt_ids=[pilot.positions[index] for index, _ in wanted],
            continued=[Continuation(number, 0, self.room) for _, number in wanted],
        )
        for (index, _), (sample,) in zip(wanted, drawn):
            samples[index].append(sample)
        return samples


def _with_rest(
    positions: Sequence[int],
    bundles: Sequence[Sequence[Bundle]],
    rest: Sequence[Sequence[Sample]],
    score: Score,
) -> list[list[Bundle]]:
    """The pilot's bundles with the scored completions of `rest` behind theirs."""
    together = [list(row) for row in bundles]
    more = [index for index, row in enumerate(rest) if row]
    scored = score([positions[i] for i in more], [rest[i] for i in more]) if more else []
    for index, bundle in zip(more, scored):
        if bundle is not None:
            before = together[index]
            together[index] = [joined(before[0], bundle)] if before else [bundle]
    return together


def alike(bundles: dict[int, list[Bundle]], accelerator: Accelerator) -> dict[int, list[Bundle]]:
    """The bundles with importance weights with which every prompt counts alike, however many
    completions it has: its share of the prompts over its share of the completions.
    """
    own = [len(bundle.completions) for row in bundles.values() for bundle in row]
    sizes = gather_object(own)
    mean = sum(sizes) / max(len(sizes), 1)
    return {place: [_weighed(bundle, mean) for bundle in row] for place, row in bundles.items()}


def _weighed(bundle: Bundle, mean: float) -> Bundle:
    count = len(bundle.completions)
    before = bundle.rows.get("importance", torch.ones(count, dtype=torch.float64))
    return replace(bundle, rows={**bundle.rows, "importance": before * (mean / count)})
