"""Decoders: completions of finished models under a rule, each with its KL and its price.

A decoder stands where a trained model stands: `decode` takes prompts and gives completions with the
noise of (seed, step, prompt, completion), so that samples depend on nothing else. Axes: P prompts,
K completions of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from alignkit.batches import Draw
from alignkit.data.prompts import Prompt
from alignkit.decoding.certificate import kl_interval
from alignkit.decoding.scoring import Scorer
from alignkit.errors import NumericsError
from alignkit.metrics.baselines import best_of_n_kl
from alignkit.metrics.intervals import Array
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.noise import row_keys, uniform
from alignkit.rollout.protocol import Sample

# Samples of rejection that are drawn for each completion at a time.
_TRIES_AT_A_TIME = 8


@dataclass(frozen=True)
class Decoded:
    """P prompts, K completions of each; arrays are [P, K]."""

    ids: list[list[Tensor]]  # P x K tokens, the end token included
    ended: Array  # 1 where the end token was sampled

    # Of log q(y) / base(y) along each completion, so that its mean is KL(q || base). With `kl_low`
    # the KL is known between the means of the two; without, the mean of `kl` is it.
    kl: Array
    tokens: Array  # the price: tokens that were computed for the completion
    reward_calls: Array  # and texts that the reward scored
    kl_low: Array | None = None

    # To whom `kl` is measured: the model itself, or at once the reference.
    base: str = "model"

    # Where the decoder's own law is known token by token.
    logp: Array | None = None
    reference_logp: Array | None = None
    entropy: Array | None = None


class Decoder(Protocol):
    """Draws completions of prompts."""

    def decode(self, prompts: Sequence[Prompt], completions: int, *, step: int = 0) -> Decoded:
        """`completions` for each of the prompts; under one seed and step the same ones again."""
        ...


@dataclass(frozen=True)
class TokenDecoder:
    """One or several models that sample together, token by token: `sample`, `fuse` and `guide`.

    Their KL to the reference is exact at each token, whatever temperature and nucleus are.
    """

    sampler: HFSampler  # measures
    weights: dict[str, float] = field(default_factory=dict)

    def decode(self, prompts: Sequence[Prompt], completions: int, *, step: int = 0) -> Decoded:
        """See `Decoder`."""
        draw = Draw(completions, weights=self.weights)
        samples = _sampled(self.sampler, prompts, draw, step)
        lengths = np.array([[len(sample.ids) for sample in row] for row in samples], dtype=float)
        return Decoded(
            ids=[[sample.ids for sample in row] for row in samples],
            ended=_ended(samples),
            kl=_sums(samples, "kl"),
            tokens=lengths * len(draw.models),
            reward_calls=np.zeros_like(lengths),
            base="reference",
            logp=_sums(samples, "logps"),
            reference_logp=_sums(samples, "reference_logps"),
            entropy=_sums(samples, "entropy"),
        )


@dataclass(frozen=True)
class PoolDecoder:
    """Of `n` samples of the model one is taken: the best, or with `beta` one drawn with probability
    softmax(r / beta) (Verdun et al. 2025, arXiv:2505.03156).

    The KL of the best is the estimator of Beirami et al. 2024, arXiv:2401.01879. That of a drawn
    one is an interval, whose fresh runs are the pools of the prompt's other completions.
    """

    sampler: HFSampler
    scorer: Scorer
    n: int
    beta: float | None = None

    def decode(self, prompts: Sequence[Prompt], completions: int, *, step: int = 0) -> Decoded:
        """See `Decoder`."""
        samples = _sampled(self.sampler, prompts, Draw(completions * self.n), step)
        ids = [[sample.ids for sample in row] for row in samples]
        shape = (len(prompts), completions, self.n)
        rewards = self.scorer.of_completions(prompts, ids).reshape(shape)
        kl_low = None
        if self.beta is None:
            chosen = rewards.argmax(-1)
        else:
            tilts = rewards / self.beta
            noise = _uniforms(self.sampler.seed, step, *shape[:2], self.sampler.max_new_tokens)
            chosen = _drawn(tilts, noise)

        taken = chosen + self.n * torch.arange(completions)  # [P, K] into the prompt's samples
        rows = [[row[place] for place in places] for row, places in zip(samples, taken.tolist())]
        if self.beta is None:
            kl = best_of_n_kl(_sums(rows, "logps"), self.n)
        else:
            low, high = _pool_interval(tilts, chosen)
            kl = high.numpy()
            kl_low = low.numpy()

        lengths = np.array([[len(sample.ids) for sample in row] for row in samples], dtype=float)
        return Decoded(
            ids=[[sample.ids for sample in row] for row in rows],
            ended=_ended(rows),
            kl=kl,
            kl_low=kl_low,
            tokens=lengths.reshape(shape).sum(-1),
            reward_calls=np.full(shape[:2], float(self.n)),
        )


def _drawn(tilts: Tensor, uniforms: Tensor) -> Tensor:
    """A candidate by its weight: tilts [P, K, n], numbers in (0, 1) [P, K] -> [P, K]."""
    sums = tilts.softmax(-1).cumsum(-1)
    points = uniforms[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, points, right=True)[..., 0].clamp(max=tilts.shape[-1] - 1)


def _pool_interval(tilts: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_interval` of soft best-of-n: tilts [P, K, n], chosen [P, K] -> low, high [P, K].

    A run that is conditional on y is y among n - 1 samples that know nothing of it: those of the
    prompt's other completions.
    """
    completions, n = tilts.shape[1:]
    own = tilts.gather(-1, chosen[..., None])[..., 0]  # [P, K]
    log_n = np.log(n)
    log_z = tilts.logsumexp(-1) - log_n

    others = tilts[..., : n - 1].logsumexp(-1)  # [P, K] of n - 1 samples of each pool
    fresh = [
        torch.logaddexp(own, others.roll(shift, dims=1)) - log_n for shift in range(1, completions)
    ]
    conditional = torch.stack(fresh) if fresh else own.new_zeros(0, *own.shape)
    return kl_interval(own, log_z, conditional)


@dataclass(frozen=True)
class RejectionDecoder:
    """Quasi rejection: a sample of the model is accepted with probability min(1, e^(r / beta) /
    bound) (Eikema et al. 2021, arXiv:2112.05702).

    Of the accepted law p min(e^(r / beta), bound) / Z_bound the KL is E[min(r / beta, log bound)] -
    log Z_bound, with Z_bound from all samples that were tried for the prompt.
    """

    sampler: HFSampler
    scorer: Scorer
    beta: float
    bound: float
    tries: int

    def decode(self, prompts: Sequence[Prompt], completions: int, *, step: int = 0) -> Decoded:
        """See `Decoder`. NumericsError where a completion is not accepted within `tries` samples."""
        shape = (len(prompts), completions)
        accepted: dict[tuple[int, int], Sample] = {}
        capped = np.zeros(shape)  # min(r / beta, log bound) of the accepted
        tokens = np.zeros(shape)
        calls = np.zeros(shape)
        tried: list[list[float]] = [[] for _ in prompts]  # the same of all that were tried

        for first in range(0, self.tries, _TRIES_AT_A_TIME):
            count = min(_TRIES_AT_A_TIME, self.tries - first)
            waiting = [place for place in np.ndindex(*shape) if place not in accepted]
            if not waiting:
                break
            samples, values, accepts = self._tried(prompts, waiting, count, first, step)
            for place, row, row_values, row_accepts in zip(waiting, samples, values, accepts):
                tried[place[0]] += row_values
                for sample, value, accept in zip(row, row_values, row_accepts):
                    tokens[place] += len(sample.ids)
                    calls[place] += 1
                    if accept:
                        accepted[place] = sample
                        capped[place] = value
                        break

        if len(accepted) < capped.size:
            rate = np.exp(np.mean(np.concatenate(tried)) - np.log(self.bound))
            raise NumericsError(
                f"reject: none of {self.tries} samples for a completion was accepted (the rate is "
                f"about {rate:.1g}); lower `bound`, raise `beta` or allow more `tries`"
            )
        log_z = np.array([np.logaddexp.reduce(row) - np.log(len(row)) for row in tried])
        rows = [[accepted[i, k] for k in range(completions)] for i in range(len(prompts))]
        return Decoded(
            ids=[[sample.ids for sample in row] for row in rows],
            ended=_ended(rows),
            kl=capped - log_z[:, None],
            tokens=tokens,
            reward_calls=calls,
        )

    def _tried(
        self,
        prompts: Sequence[Prompt],
        waiting: Sequence[tuple[int, int]],
        count: int,
        first: int,
        step: int,
    ) -> tuple[list[list[Sample]], list[list[float]], list[list[bool]]]:
        """`count` more samples for each of the waiting (prompt, completion), their min(r / beta, log
        bound), and which are accepted. `first` is the number of the first of them.
        """
        # Every completion and round of tries is a stream of noise of its own.
        streams = [p + ((k + 1) << 24) + ((first + 1) << 44) for p, k in waiting]
        owners = [prompts[p] for p, _ in waiting]
        ids = [owner.ids for owner in owners]
        samples = self.sampler.sample(ids, Draw(count), step=step, prompt_ids=streams)

        rewards = self.scorer.of_completions(owners, [[s.ids for s in row] for row in samples])
        log_bound = float(np.log(self.bound))
        values = (rewards / self.beta).clamp(max=log_bound)

        prompt_ids = torch.tensor(streams)[:, None].expand(-1, count).flatten()
        number = torch.arange(count).repeat(len(waiting))
        keys = row_keys(self.sampler.seed, step, prompt_ids, -1 - number, torch.zeros_like(number))
        noise = uniform(keys, 1)[:, 0].double().reshape(values.shape)
        return samples, values.tolist(), (noise < (values - log_bound).exp()).tolist()


def _sampled(
    sampler: HFSampler, prompts: Sequence[Prompt], draw: Draw, step: int
) -> list[list[Sample]]:
    ids = [prompt.ids for prompt in prompts]
    return sampler.sample(ids, draw, step=step, prompt_ids=range(len(ids)))


def _uniforms(seed: int, step: int, prompts: int, completions: int, position: int) -> Tensor:
    """A number in (0, 1) for each completion: [P, K], apart from the noise of its tokens."""
    prompt = torch.arange(prompts).repeat_interleave(completions)
    completion = torch.arange(completions).repeat(prompts)
    keys = row_keys(seed, step, prompt, -1 - completion, torch.full_like(prompt, position))
    return uniform(keys, 1)[:, 0].double().reshape(prompts, completions)


def _ended(samples: Sequence[Sequence[Sample]]) -> Array:
    return np.array([[sample.ended for sample in row] for row in samples], dtype=float)


def _sums(samples: Sequence[Sequence[Sample]], name: str) -> Array:
    """Sums of a number over the tokens of each completion, [P, K]."""
    return np.array([[float(getattr(s, name).double().sum()) for s in row] for row in samples])
