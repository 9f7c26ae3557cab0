"""Figures of a finished model against its reference: same prompts and same noise for every model
that is compared.

Axes: P prompts, K completions of each. All KLs are in nats per completion, of the distribution that
is cut at `max_new_tokens`, at temperature 1 and over the whole vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.batches import Bundle, Draw, PairBatch, Plan
from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles
from alignkit.data.prompts import Prompt
from alignkit.data.read import Source
from alignkit.errors import ModelError
from alignkit.evaluation.episodes import (
    World,
    counts,
    failures,
    own_tokens,
    scores,
    segments_of,
    turn_by_turn,
)
from alignkit.evaluation.measurements import Measured
from alignkit.kl import exact
from alignkit.objectives.base import Objective
from alignkit.policies.module import PolicyModule, causal_lm, frozen
from alignkit.policies.pair import SCORING_BUDGET, PolicyPair
from alignkit.policies.probe import choose_layout, probe_bundle
from alignkit.policies.reference import Anchor
from alignkit.policies.tokenizer import same_vocabulary
from alignkit.rewards.call import RewardCall, call_reward
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.text import as_reply, decode_all
from alignkit.runs.trained_model import load_finished


def _reverse(policy: Tensor, anchor: Tensor | None, labels: Tensor) -> Tensor:
    assert anchor is not None
    return exact(policy, anchor, "reverse")


def _forward(policy: Tensor, anchor: Tensor | None, labels: Tensor) -> Tensor:
    assert anchor is not None
    return exact(policy, anchor, "forward")


# What is computed of each token: its log-probs, and with two of these plans an exact KL.
REVERSE = Plan("rollout", statistics={"kl": _reverse})
FORWARD = Plan("rollout", statistics={"kl": _forward})
LIVE = Plan("sequence")


def evaluation_pair(model: str | Path, reference: str | Path | OneModel) -> PolicyPair:
    """A finished model (run folder, model or adapter folder, hub
    name, `task:NAME`) with what it is measured against.

    Give an open reference (`alignkit.runs.trained_model.load_finished`) where several models share
    it. ModelError where there is no model, or its tokens are not the reference's.
    """
    policy = load_finished(str(model))
    anchor = reference if isinstance(reference, OneModel) else load_finished(str(reference))
    policy_config = _text_config(policy)
    same_size = policy_config.vocab_size == _text_config(anchor).vocab_size
    if not same_vocabulary(policy.tokenizer, anchor.tokenizer) or not same_size:
        name = "" if isinstance(reference, OneModel) else f" {reference}"
        raise ModelError(
            f"{model} and its reference{name} have different tokenizers "
            f"({len(policy.tokenizer)} and {len(anchor.tokenizer)} tokens): "
            "log-probs of different tokens cannot be compared"
        )

    # As in a run, one row longer than the sliding window decides which layout is right.
    base = PolicyModule(policy.network).eval()
    window = max((size for size in base.windows.values() if size), default=None)
    context = getattr(policy_config, "max_position_embeddings", None)
    probe = probe_bundle(policy_config.vocab_size, window, context)
    layout, note = choose_layout(base, "auto", probe)

    anchors = {"reference": Anchor("frozen", frozen(PolicyModule(anchor.network)))}
    return PolicyPair(base, policy.tokenizer, anchors, layout=layout, notes=[note] if note else [])


def _text_config(model: OneModel) -> Any:
    network: Any = causal_lm(model.network)
    return network.config.get_text_config()


@dataclass(frozen=True)
class Yardstick:
    """What stays the same for every model: prompts, noise, number and length of the completions,
    the reward; and the world, where completions are episodes of several turns.
    """

    prompts: Sequence[Prompt]
    samples: int = 8
    max_new_tokens: int = 64
    seed: int = 0
    reward: RewardCall | None = None
    world: World | None = None

    def measure(self, pair: PolicyPair, name: str, *, base: Measured | None = None) -> Measured:
        """Samples of the pair's policy with their figures; with `base` (see `measure_reference`)
        also its forward KL. Episodes have none.
        """
        return self._measured(pair, name, "policy", base)

    def measure_reference(self, pair: PolicyPair, name: str = "base") -> Measured:
        """The same for the pair's reference: where every frontier starts."""
        return self._measured(pair, name, "reference", None)

    def _measured(
        self, pair: PolicyPair, name: str, source: str, base: Measured | None
    ) -> Measured:
        if self.world is not None:
            return self._measured_episodes(self.world, pair, name, source)
        prompts = [prompt.ids for prompt in self.prompts]
        shape = (len(prompts), self.samples)
        sampler = HFSampler(pair, max_new_tokens=self.max_new_tokens, seed=self.seed)
        drawn = sampler.sample(
            prompts, Draw(self.samples, source), step=0, prompt_ids=range(len(prompts))
        )
        tokens = [[sample.ids for sample in samples] for samples in drawn]

        bundles = [bundle_of(prompt, ids) for prompt, ids in zip(prompts, tokens)]
        sums = scored(pair, bundles, REVERSE if source == "policy" else LIVE)
        arrays = {name: np.array(values).reshape(shape) for name, values in sums.items()}
        if source == "reference":
            arrays |= {"logp": arrays["reference_logp"], "kl": np.zeros(shape)}

        if base is not None:  # the forward KL, along the reference's own samples
            bundles = [
                bundle_of(prompt, [torch.tensor(ids) for ids in completions])
                for prompt, completions in zip(prompts, base.tokens)
            ]
            forward = scored(pair, bundles, FORWARD)
            arrays["forward_kl"] = np.array(forward["kl"]).reshape(shape)
            arrays["forward_logp"] = np.array(forward["logp"]).reshape(shape)

        texts = decode_all(pair.tokenizer, tokens)
        return Measured(
            name=name,
            prompts=[prompt.text for prompt in self.prompts],
            texts=texts,
            tokens=[[ids.tolist() for ids in row] for row in tokens],
            ended=np.array([[sample.ended for sample in samples] for samples in drawn]),
            score=self.scores(texts, tokens),
            **arrays,
        )

    def _measured_episodes(
        self, world: World, pair: PolicyPair, name: str, source: str
    ) -> Measured:
        """The same for episodes. Sums go over the tokens that the policy has drawn."""
        sampler = HFSampler(pair, max_new_tokens=self.max_new_tokens, seed=self.seed)
        rows = world.play(pair, sampler, self.prompts, Draw(self.samples, source))
        bundles, episode_of = segments_of(rows)
        # Of an episode that failed nothing is known: zeros would pull every mean down.
        failed = failures(rows)

        arrays = {}
        sums = scored(pair, bundles, REVERSE if source == "policy" else LIVE)
        for sum_name, values in sums.items():
            of_episodes = np.zeros(len(rows) * self.samples)
            np.add.at(of_episodes, episode_of, values)
            arrays[sum_name] = np.where(
                failed, np.nan, of_episodes.reshape(len(rows), self.samples)
            )
        if source == "reference":
            zero = 0 * arrays["reference_logp"]
            arrays |= {"logp": arrays["reference_logp"], "kl": zero}

        return Measured(
            name=name,
            prompts=[row[0].prompt for row in rows],
            texts=turn_by_turn(rows),
            tokens=own_tokens(rows),
            ended=np.where(failed, np.nan, [[episode.ended for episode in row] for row in rows]),
            failed=failed.astype(float),
            score=scores(rows, self.prompts, self.reward, world.environments),
            **counts(rows),
            **arrays,
        )

    def scores(self, texts: list[list[str]], tokens: list[list[Tensor]]) -> np.ndarray | None:
        """The reward of every completion [P, K], nan where it does not
        apply; None without a reward.
        """
        if self.reward is None:
            return None
        replies = [[as_reply(p.text, t) for t in row] for p, row in zip(self.prompts, texts)]
        ids = [[t.tolist() for t in row] for row in tokens]
        scores = call_reward(self.reward, self.prompts, replies, ids)
        return np.array(
            [[np.nan if score is None else score for score in row] for row in scores], dtype=float
        )


@torch.no_grad()
def scored(pair: PolicyPair, bundles: Sequence[Bundle], plan: Plan) -> dict[str, list[float]]:
    """Sums over each completion, in the bundles' order: "logp", "reference_logp", "entropy", and
    the plan's statistics.
    """
    # name of the sum -> name of the values of each token
    names = {"logp": "policy", "reference_logp": "reference", "entropy": "entropy"}
    names |= {statistic: statistic for statistic in plan.statistics}

    rows: list[dict[str, list[float]]] = [{} for _ in bundles]
    for group in pair.micro_batches(bundles, SCORING_BUDGET):
        logps = pair.logps([bundles[i] for i in group], plan)
        sums = {name: iter(logps.sequence(of).double().tolist()) for name, of in names.items()}
        for index in group:
            completions = range(len(bundles[index].completions))
            rows[index] = {
                name: [next(values) for _ in completions] for name, values in sums.items()
            }
    return {name: [value for row in rows for value in row[name]] for name in names}


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-prob per token) of a text."""

    policy: float
    reference: float
    tokens: int


def perplexity(pair: PolicyPair, source: Source, data: DataConfig | None = None) -> Perplexity:
    """Of held-out text (rows with `text`, or demonstrations): what a
    model forgot shows as policy above reference.
    """
    bundles, _ = load_bundles(data or DataConfig(), "sequence", pair.tokenizer, source=source)
    sums = scored(pair, bundles, LIVE)
    tokens = sum(bundle.n_trained for bundle in bundles)
    return Perplexity(
        policy=math.exp(-sum(sums["logp"]) / tokens),
        reference=math.exp(-sum(sums["reference_logp"]) / tokens),
        tokens=tokens,
    )


@torch.no_grad()
def preference_margins(
    pair: PolicyPair,
    source: Source,
    data: DataConfig | None = None,
    *,
    objective: Objective | None = None,
) -> np.ndarray | None:
    """How much each held-out pair's chosen completion is preferred to the rejected: [N].

    Without `objective` the difference of their log-ratios: its sign is a preference, its size says
    nothing. With it the margin of the objective's own implicit reward (beta times that, for DPO),
    in log-odds: what `metrics.preference_calibration` takes; None for an objective that does not
    learn from pairs, has no such reward, or compares with what its run alone had.
    """
    if objective is not None:
        plan = objective.plan
        own = set(plan.anchors) - pair.anchors.keys() or plan.outputs or plan.values
        if plan.data != "pair" or own:
            return None

    bundles, _ = load_bundles(data or DataConfig(), "pair", pair.tokenizer, source=source)
    if objective is None:
        sums = scored(pair, bundles, LIVE)
        log_ratios = np.array(sums["logp"]) - np.array(sums["reference_logp"])
        chosen, rejected = log_ratios.reshape(-1, 2).T
        return chosen - rejected

    margins = np.empty(len(bundles))
    for group in pair.micro_batches(bundles, SCORING_BUDGET):
        rows = [bundles[i] for i in group]
        batch = PairBatch.build(rows, pair.logps(rows, objective.plan))
        values = objective.loss(batch).metrics.get("rewards/margins")
        if values is None:
            return None
        margins[group] = values.cpu()
    return margins


def bundle_of(prompt: Tensor, completions: Sequence[Tensor]) -> Bundle:
    """One prompt with completions of which every token counts."""
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in completions]
    return Bundle(prompt, list(completions), masks)
