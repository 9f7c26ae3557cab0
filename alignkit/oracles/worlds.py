"""Random batches of every family, made of logits: what a model and a loop would hand to an
objective, small and in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.batches import (
    FAMILIES,
    Bundle,
    Family,
    Outputs,
    Plan,
    RolloutBatch,
    TokenLogps,
    batch_type,
)
from alignkit.objectives.base import Objective

PROMPTS = 4
LENGTH = 5
VOCAB = 7
GROUP = 4


@dataclass(frozen=True)
class Draft:
    """The numbers of one bundle before it has tokens."""

    better: Tensor  # [K], see `TabularWorld`
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    mismatched: bool = False


def _sequence(plan: Plan, noise: torch.Generator, i: int) -> list[Draft]:
    # Every other answer is one that a draw has put in the place of the row's own.
    rows = {"draw": torch.tensor([i % 2 - 1])} if plan.samples else {}
    return [Draft(torch.ones(1), rows)]


def _pair(plan: Plan, noise: torch.Generator, i: int) -> list[Draft]:
    beside = sum(d.n or GROUP for d in plan.samples)
    rows = {"table": _table(2 + beside, noise)} if plan.feedback == "table" else {}
    return [Draft(torch.tensor([1.0, -1.0, *[0.0] * beside]), rows)]


def _ranked(plan: Plan, noise: torch.Generator, i: int) -> list[Draft]:
    count = 2 + i % 3
    return [Draft(torch.linspace(1, -1, count))]


def _labelled(plan: Plan, noise: torch.Generator, i: int) -> list[Draft]:
    label = torch.tensor([i % 2 == 0])
    matched = Draft(2.0 * label - 1, {"label": label})
    if not plan.mismatched:
        return [matched]
    return [matched, Draft(torch.zeros(1), {"label": label}, mismatched=True)]


def _rollout(plan: Plan, noise: torch.Generator, i: int) -> list[Draft]:
    count = sum(draw.n or GROUP for draw in plan.samples if draw.scored)
    score = torch.randn(count, generator=noise, dtype=torch.float64)
    draws = [k for k, draw in enumerate(plan.samples) for _ in range(draw.n or GROUP)]
    rows = {"draw": torch.tensor(draws)} if len(plan.samples) > 1 else {}
    if plan.feedback != "none":
        rows["score"] = score
    return [Draft(score - score.mean(), rows)]


def _with_turns(bundle: Bundle) -> Bundle:
    """Each run of own tokens is a turn, taken in a state of its number; the last earns the score."""
    turns, rewards = [], []
    for mask, score in zip(bundle.masks, RolloutBatch.scores_of(bundle), strict=True):
        begins = mask & ~pad(mask[:-1], (1, 0))
        turns.append(torch.where(mask, begins.cumsum(0) - 1, -1))
        reward = torch.zeros(len(mask), dtype=torch.float64)
        reward[mask.nonzero()[-1]] = score
        rewards.append(reward)

    states = [turn.clamp(min=0) for turn in turns]
    return replace(bundle, tokens={"turn": turns, "state": states, "reward": rewards})


def _table(count: int, noise: torch.Generator) -> Tensor:
    """Random P(row beats column), P + P^T = 1: [count, count]."""
    table = torch.rand(count, count, generator=noise, dtype=torch.float64)
    return (table + 1 - table.T) / 2


def _game(plan: Plan, noise: torch.Generator, i: int) -> list[Draft]:
    """Judged against the opponent that was set aside, or else
    against the last completion (1/2 against itself).
    """
    count = sum(d.n or GROUP for d in plan.samples if d.scored)
    table = _table(count, noise)
    aside = any(not d.scored for d in plan.samples)
    preference = torch.rand(count, generator=noise, dtype=torch.float64) if aside else table[:, -1]
    if plan.feedback != "table":
        average = 0.5 if count == 1 else preference.mean()
        return [Draft(preference - average, {"preference": preference})]
    mean = table.mean(-1)
    return [Draft(mean - mean.mean(), {"preference": mean, "table": table})]


DRAFTS: dict[Family, Callable[[Plan, torch.Generator, int], list[Draft]]] = {
    "sequence": _sequence,
    "pair": _pair,
    "ranked": _ranked,
    "labelled": _labelled,
    "rollout": _rollout,
    "game": _game,
}


@dataclass(frozen=True)
class TabularWorld:
    """N completions of a few prompts with the logits of every policy involved. Only `policy` and
    `values` are trained.
    """

    plan: Plan
    bundles: Sequence[Bundle]
    policy: Tensor  # [N, T, V] logits
    anchors: Mapping[str, Tensor]  # name -> [N, T, V] logits
    behavior: Tensor  # [N, T, V] logits
    values: Tensor  # [N, T] what the value head says
    labels: Tensor  # [N, T] int64
    mask: Tensor  # [N, T] bool
    better: Tensor  # [N] above 0 where training should make a completion more likely, below: less

    @classmethod
    def build(cls, plan: Plan, seed: int = 0) -> "TabularWorld":
        """A random world for `plan`: completions of unequal length with holes in their masks."""
        noise = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=noise, dtype=torch.float64)

        drafts = [draft for i in range(PROMPTS) for draft in DRAFTS[plan.data](plan, noise, i)]
        better = torch.cat([d.better for d in drafts])
        lengths = torch.randint(2, LENGTH + 1, better.shape, generator=noise)
        mask = (torch.rand(len(better), LENGTH, generator=noise) < 0.8) & (
            torch.arange(LENGTH) < lengths[:, None]
        )
        mask[:, 0] = True
        labels = torch.randint(VOCAB, mask.shape, generator=noise)
        bundles = []
        at = 0
        for i, draft in enumerate(drafts):
            part = range(at, at := at + len(draft.better))
            ids, masks = ([t[n, : lengths[n]] for n in part] for t in (labels, mask))
            bundle = Bundle(
                torch.tensor([i]), ids, masks, str(i), draft.rows, mismatched=draft.mismatched
            )
            bundles.append(_with_turns(bundle) if FAMILIES[plan.data].credited else bundle)
        shape = (*mask.shape, VOCAB)
        anchors = {name: normal(*shape) for name in plan.anchors}
        return cls(
            plan,
            bundles,
            normal(*shape),
            anchors,
            normal(*shape),
            normal(*mask.shape),
            labels,
            mask,
            better,
        )

    def tokens(self, dtype: torch.dtype | None = None) -> TokenLogps:
        """Log-probs and statistics of these logits, as the head
        computes them; `dtype` casts the result.
        """
        logprobs = {name: logits.log_softmax(-1) for name, logits in self.anchors.items()}
        policy = self.policy.log_softmax(-1)
        behavior = self.behavior.log_softmax(-1)
        first = logprobs[self.plan.anchors[0]].flatten(0, 1) if self.plan.anchors else None
        extras = {
            name: f(policy.flatten(0, 1), first, self.labels.flatten())
            for name, f in self.plan.statistics.items()
        }
        extras["entropy"] = -(policy.exp() * policy).sum(-1).detach()
        if self.plan.values:
            extras["values"] = self.values
        if self.plan.partition:
            extras["log_partition"] = self.policy.logsumexp(-1)
        if self.plan.bins:  # any law of the bins that moves with the values
            numbers = torch.arange(self.plan.bins, dtype=self.values.dtype)
            bins = (self.values.unsqueeze(-1) * numbers).log_softmax(-1)
            extras |= {f"bin_{number}": law for number, law in enumerate(bins.unbind(-1))}

        def masked(values: Tensor) -> Tensor:
            values = values.reshape(self.mask.shape)
            return torch.where(self.mask, values, values.new_zeros(())).to(dtype or values.dtype)

        def of_labels(logprobs: Tensor) -> Tensor:
            return masked(logprobs.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1))

        return TokenLogps(
            policy=of_labels(policy),
            anchors={name: of_labels(values) for name, values in logprobs.items()},
            mask=self.mask,
            behavior=of_labels(behavior) if FAMILIES[self.plan.data].sampled else None,
            extras={name: masked(values) for name, values in extras.items()},
        )

    def credited(self, objective: Objective) -> "TabularWorld":
        """With the objective's credit of this rollout in the bundles, as the loop writes it there;
        other families unchanged. Where the plan says that the credit does not read the policy, its
        log-probs are NaN, as in the loop.
        """
        if not FAMILIES[self.plan.data].credited:
            return self
        tokens = self.tokens().map(Tensor.detach)
        read = tokens
        if not objective.plan.credit_reads_policy:
            unknown = torch.full_like(tokens.policy, torch.nan).where(tokens.mask, 0.0)
            read = replace(tokens, policy=unknown, extras={})
        rollout = RolloutBatch.build(self.bundles, read)
        batch, _ = objective.credit(rollout, objective.init_state())
        channels = {
            "advantages": batch.advantages,
            "returns": batch.returns,
            "values": tokens.extras.get("values"),
            "weights": batch.weights,
        }
        bundles = []
        at = 0
        for bundle in self.bundles:
            lengths = [len(ids) for ids in bundle.completions]
            rows = {
                name: [values[at + i, :length] for i, length in enumerate(lengths)]
                for name, values in channels.items()
                if values is not None
            }
            bundles.append(replace(bundle, tokens={**bundle.tokens, **rows}))
            at += len(lengths)
        # the value head has moved on since
        return replace(self, bundles=bundles, values=self.values + 0.5)

    def select(self, chosen: Sequence[int]) -> "TabularWorld":
        """The bundles at `chosen`, in that order."""
        starts = [0]
        for bundle in self.bundles:
            starts.append(starts[-1] + len(bundle.completions))
        rows = torch.tensor([n for i in chosen for n in range(starts[i], starts[i + 1])])
        picked = self.map(lambda t: t[rows])
        return replace(picked, bundles=[self.bundles[i] for i in chosen], better=self.better[rows])

    def padded(self, extra: int) -> "TabularWorld":
        """`extra` masked positions more."""
        return self.map(lambda t: pad(t, (0, 0) * (t.dim() - 2) + (0, extra)))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TabularWorld":
        """`fn` applied to every tensor with axes [N, T, ...]."""
        return replace(
            self,
            policy=fn(self.policy),
            anchors={name: fn(logits) for name, logits in self.anchors.items()},
            behavior=fn(self.behavior),
            values=fn(self.values),
            labels=fn(self.labels),
            mask=fn(self.mask),
        )


def reduced(
    objective: Objective,
    world: TabularWorld,
    tokens: TokenLogps,
    counts: dict[str, int] | None = None,
) -> Tensor:
    """The scalar that the loop differentiates: every term's sum over its count (of `counts`, where
    `world` is a part).
    """
    plan = objective.plan
    family = batch_type(plan)
    counts = counts or family.counts(world.bundles)
    seen = outputs_of(tokens, plan) if plan.outputs else tokens
    terms = objective.loss(family.build(world.bundles, seen)).terms
    return torch.stack(
        [term.weight * term.values.sum() / counts[term.unit] for term in terms]
    ).sum()


def outputs_of(tokens: TokenLogps, plan: Plan) -> Outputs:
    """What a scorer would give for these completions if their log-prob were their reward.

    One output is the log-prob itself. Several are an embedding `[t_1, 1, t_2, 1, ...]` of the
    tokens' log-probs, whose skew-symmetric product is the difference of the rewards.
    """
    masked = torch.where(tokens.mask, tokens.policy, 0.0)
    if plan.outputs == 1:
        return Outputs(masked.sum(-1, keepdim=True))
    return Outputs(torch.stack([masked, torch.ones_like(masked)], -1).flatten(1))


def trained(world: TabularWorld) -> TabularWorld:
    """The same world with fresh leaves where the policy and its values are trained."""
    return replace(
        world,
        policy=world.policy.detach().requires_grad_(),
        values=world.values.detach().requires_grad_(),
    )


def gradient(loss: Tensor, world: TabularWorld) -> Tensor:
    """Gradient of `loss` with respect to the world's logits and values, [N, T, V + 1]."""
    leaves = (world.policy, world.values)
    gradients: tuple[Tensor | None, ...] = (None, None)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    logits, values = (
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients)
    )
    return torch.cat([logits, values.unsqueeze(-1)], -1)


def solved(
    objective: Objective, world: TabularWorld, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of `objective` on `world`."""
    world = trained(world)
    loss = reduced(objective, world, world.tokens(dtype))
    return loss.detach(), gradient(loss, world)


def distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Largest difference of two (loss, gradient), relative to their size where that is above 1."""
    gaps = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(first, second)]
    return float(torch.stack(gaps).max())
