"""Exact figures of a neural policy on a task that can be listed: no samples, no renormalising.

The outcomes of a prompt are the n completions of the grammar and, last, everything else: what the
grammar cannot write and what does not end. Axes: P prompts, n + 1 outcomes. Everything is float64.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.objectives.base import Objective
from alignkit.oracles.optima import tree_optimum
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair
from alignkit.policies.tabular import Tree

PLAN = Plan("rollout", anchors=())
BUDGET = 8192  # tokens of one forward pass
# mass outside the grammar is never read as less: the sum of the rest is not more exact
LEAST = 1e-12


@dataclass(frozen=True)
class Figures:
    """Means over the prompts, in nats and rewards."""

    reward: float  # E[r] under the policy
    kl: float  # KL(policy || reference)
    outside: float  # probability of everything outside the grammar
    kl_optimum: float | None = None  # KL(policy || optimum)
    share: float | None = None  # (J - J_ref) / (J* - J_ref) with J = E[r] - beta * KL


def outcome_logps(pair: PolicyPair, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Exact log-probs of every outcome under the pair's policy: [P, n + 1]."""
    inside = _token_logps(pair, prompts, completions).sum(-1)
    return torch.cat([inside, _rest(inside)], dim=-1)


def folder_logps(folder: Path | str, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """The same for a model in a folder: a task's base, or a run's `model`."""
    return outcome_logps(pair_of_folder(folder), prompts, completions)


def folder_optimum(
    objective: Objective,
    folder: Path | str,
    prompts: Sequence[str],
    completions: Sequence[str],
    rewards: Tensor,
) -> Tensor | None:
    """The closed form that `objective` promises with `rewards` [n + 1] and the reference in
    `folder`: log-probs [P, n + 1].

    None where it has none. An objective whose optimum is reached token by token (it has a `backup`)
    is solved on the tree of the completions' tokens; there whatever leaves the grammar at a prefix
    is one leaf of that prefix.
    """
    pair = pair_of_folder(folder)
    if objective.backup(torch.zeros(1), torch.zeros(1)) is None:
        return objective.optimum(rewards, outcome_logps(pair, prompts, completions))

    n = len(completions)
    tree = completion_tree([_tokens(pair.tokenizer, text) for text in completions])
    leaves = torch.cat([rewards[:n], rewards[n:].expand(len(tree.tokens) - n)])

    optima = []
    for logps in _token_logps(pair, prompts, completions):
        policy = tree_optimum(objective, tree, leaves, _tree_reference(tree, logps))
        if policy is None:
            return None
        every_leaf = tree.sequence_logps(policy)
        outside = every_leaf[n:].logsumexp(0, keepdim=True)
        optima.append(torch.cat([every_leaf[:n], outside]))
    return torch.stack(optima)


def _tree_reference(tree: Tree, logps: Tensor) -> Tensor:
    """The reference's log-probs at each prefix of the tree, [S, V], from those of the completions'
    tokens, [n, T]; what they leave over goes to the last token, which leaves the grammar.
    """
    n, longest = logps.shape
    inside = tree.mask[:n, :longest]
    prefixes = tree.prefixes[:n, :longest][inside]
    tokens = tree.tokens[:n, :longest][inside]

    reference = torch.full((tree.states, tree.vocab), -torch.inf, dtype=torch.float64)
    reference[prefixes, tokens] = logps[inside]
    reference[:, -1:] = _rest(reference)
    return reference


def completion_tree(completions: Sequence[Tensor]) -> Tree:
    """The token tree of n different completions, none the start of another; S prefixes. Leaves: the
    completions in their order, then for each prefix the one outcome of leaving them there, whose
    token is the last of the tree's vocabulary.
    """
    states: dict[tuple[int, ...], int] = {}  # prefix -> its number
    local: dict[tuple[int, ...], int] = {}  # prefix -> its number among its siblings
    children: Counter[tuple[int, ...]] = Counter()
    paths = []
    for ids in (tuple(tensor.tolist()) for tensor in completions):
        path = []
        for t in range(len(ids)):
            prefix = ids[:t]
            longer = ids[: t + 1]
            states.setdefault(prefix, len(states))
            if longer not in local:
                local[longer] = children[prefix]
                children[prefix] += 1
            path.append((states[prefix], local[longer]))
        paths.append(path)

    # One more token than any prefix has continuations: it leaves the completions.
    vocab = 2 + max(local.values())
    for prefix in states:
        path = [(states[prefix[:t]], local[prefix[: t + 1]]) for t in range(len(prefix))]
        paths.append([*path, (states[prefix], vocab - 1)])

    depth = max(map(len, paths))
    lengths = torch.tensor([len(path) for path in paths])
    padded = torch.tensor([path + [(0, 0)] * (depth - len(path)) for path in paths])
    return Tree(
        tokens=padded[..., 1],
        mask=torch.arange(depth) < lengths[:, None],
        prefixes=padded[..., 0],
        states=len(states),
        vocab=vocab,
    )


def outcome_rewards(rewards: Sequence[float], outside: float) -> Tensor:
    """The reward of every outcome: [n + 1]. `outside` has to be the lowest."""
    return torch.tensor([*rewards, outside], dtype=torch.float64)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probs [..., n + 1]: [...]."""
    return (first.exp() * (first - second)).sum(-1)


def figures(
    policy: Tensor,
    reference: Tensor,
    rewards: Tensor,
    *,
    optimum: Tensor | None = None,
    beta: float | None = None,
) -> Figures:
    """Exact figures of `policy` [P, n + 1] against `reference` [P, n + 1] (log-probs) with
    `rewards` [n + 1].

    With `optimum` (an objective's own, log-probs [P, n + 1]) also the KL to it; with `beta` too,
    where the objective is J = E[r] - beta * KL(policy || reference), the share of the best J.
    """
    share = None
    if optimum is not None and beta is not None:
        start, reached, best = (
            _value(p, reference, rewards, beta) for p in (reference, policy, optimum)
        )
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


@torch.no_grad()
def _token_logps(pair: PolicyPair, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Log-prob of each token of each completion under the pair's
    policy: [P, n, T], 0 after the end.
    """
    bundles = [_bundle(pair.tokenizer, prompt, completions) for prompt in prompts]
    longest = max(len(ids) for ids in bundles[0].completions)

    token_logps = torch.zeros(len(prompts), len(completions), longest, dtype=torch.float64)
    for group in pair.micro_batches(bundles, BUDGET):
        logps = pair.logps([bundles[i] for i in group], PLAN, anchors=False)
        rows = torch.where(logps.mask, logps.policy, 0).double()
        token_logps[group] = rows.view(len(group), len(completions), -1).cpu()
    return token_logps


def _rest(logps: Tensor) -> Tensor:
    """Log of the mass that the last axis leaves over."""
    return (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()


def pair_of_folder(folder: Path | str) -> PolicyPair:
    """A model in a folder, as a policy without anchors."""
    model = ModelConfig(name_or_path=str(folder))
    return load_pair(model, ReferenceConfig(), None, PLAN, device="cpu", fixed_data=True)


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])


def _bundle(tokenizer: Any, prompt: str, completions: Sequence[str]) -> Bundle:
    ids = [_tokens(tokenizer, text) for text in completions]
    return Bundle(
        torch.tensor(tokenizer(prompt)["input_ids"]),
        ids,
        [torch.ones(len(i), dtype=torch.bool) for i in ids],
        uid=prompt,
    )
