"""Exact figures of a neural policy on a world that can be listed: no samples, no renormalising.

The outcomes of a prompt are the n completions of the grammar and, last, everything else: what the grammar cannot write
and what does not end. Axes: P prompts, n + 1 outcomes. Everything is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.policies.config import ModelConfig, ReferenceConfig
from alignkit.policies.layout import micro_batches
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair

PLAN = Plan("rollout", anchors=())
BUDGET = 8192  # tokens of one forward pass
LEAST = 1e-12  # mass outside the grammar is never read as less: the sum of the rest is not more exact


@dataclass(frozen=True)
class Figures:
    """Means over the prompts, in nats and rewards."""

    reward: float  # E[r] under the policy
    kl: float  # KL(policy || reference)
    outside: float  # probability of everything outside the grammar
    kl_optimum: float | None = None  # KL(policy || optimum)
    share: float | None = None  # (J - J_ref) / (J* - J_ref) with J = E[r] - beta * KL


@torch.no_grad()
def outcome_logps(pair: PolicyPair, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Exact log-probs of every outcome under the pair's policy: [P, n + 1]."""
    bundles = [_bundle(pair.tokenizer, prompt, completions) for prompt in prompts]
    inside = torch.empty(len(prompts), len(completions), dtype=torch.float64)
    for group in micro_batches(bundles, BUDGET, pair.layout):
        found = pair.logps([bundles[i] for i in group], PLAN, anchors=False)
        inside[group] = found.policy.double().sum(-1).view(len(group), -1).cpu()
    outside = (1 - inside.exp().sum(-1, keepdim=True)).clamp(min=LEAST)
    return torch.cat([inside, outside.log()], dim=-1)


def folder_logps(folder: Path | str, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """The same for a model in a folder: a task's base, or a run's `model`."""
    model = ModelConfig(name_or_path=str(folder))
    pair = load_pair(model, ReferenceConfig(), None, PLAN, device="cpu", fixed_data=True)
    return outcome_logps(pair, prompts, completions)


def outcome_rewards(rewards: Sequence[float], outside: float) -> Tensor:
    """The reward of every outcome: [n + 1]. `outside` has to be the lowest."""
    return torch.tensor([*rewards, outside], dtype=torch.float64)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probs [..., n + 1]: [...]."""
    return (first.exp() * (first - second)).sum(-1)


def figures(
    policy: Tensor, reference: Tensor, rewards: Tensor, *, optimum: Tensor | None = None, beta: float | None = None
) -> Figures:
    """Exact figures of `policy` [P, n + 1] against `reference` [P, n + 1] (log-probs) with `rewards` [n + 1].

    With `optimum` (an objective's own, log-probs [P, n + 1]) also the KL to it; with `beta` too, where the objective is
    J = E[r] - beta * KL(policy || reference), the share of the best J.
    """
    share = None
    if optimum is not None and beta is not None:
        start, reached, best = (_value(p, reference, rewards, beta) for p in (reference, policy, optimum))
        share = (reached - start) / (best - start)
    return Figures(
        reward=float((policy.exp() * rewards).sum(-1).mean()),
        kl=float(kl(policy, reference).mean()),
        outside=float(policy[:, -1].exp().mean()),
        kl_optimum=None if optimum is None else float(kl(policy, optimum).mean()),
        share=share,
    )


def _value(policy: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> float:
    return float(((policy.exp() * rewards).sum(-1) - beta * kl(policy, reference)).mean())


def _bundle(tokenizer, prompt: str, completions: Sequence[str]) -> Bundle:
    ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in completions]
    return Bundle(
        torch.tensor(tokenizer(prompt)["input_ids"]), ids, [torch.ones(len(i), dtype=torch.bool) for i in ids], uid=prompt
    )
