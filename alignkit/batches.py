"""The data that objectives and the loop exchange: bundles in, log-probs through, loss terms out.

Reward and preference models have no log-probs: for them `Outputs` stands where `TokenLogps` stands
for language models.

Axes: B pairs or rows, K completions of one prompt, N = all completions of a batch, T tokens, V
vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from alignkit.plan import Draw as Draw
from alignkit.plan import Family as Family
from alignkit.plan import Plan as Plan
from alignkit.plan import Statistic as Statistic
from alignkit.tensors import masked_sum


@dataclass(frozen=True)
class Bundle:
    """One prompt with K completions. All tensors live on the CPU until the layout moves them.

    `rows` holds one number per completion (label, score, preference, ...), `tokens` one per token
    (behaviour or cached anchor log-probs, advantages, returns, ...), each a list of K tensors
    [T_k].
    """

    prompt: Tensor  # [P] int64, at least one token
    completions: Sequence[Tensor]  # K x [T_k] int64
    masks: Sequence[Tensor]  # K x [T_k] bool: which tokens are trained; may have holes (dialogues)
    uid: str = ""  # where the row comes from ("preferences.jsonl:17"); named in errors
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [K]
    tokens: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)  # name -> K x [T_k]
    # this prompt with another prompt's completion (KTO's z0), never trained on
    mismatched: bool = False

    @property
    def n_trained(self) -> int:
        """Trained tokens over all completions."""
        return sum(int(mask.sum()) for mask in self.masks)

    @property
    def n_tokens(self) -> int:
        """Tokens the shared-prefix layout computes for this bundle."""
        return len(self.prompt) + sum(len(ids) for ids in self.completions)


@dataclass(frozen=True)
class TokenLogps:
    """Per-token log-probs of N completions, padded to T. Everything is 0 where `mask` is False."""

    policy: Tensor  # [N, T] log pi(y_t | prompt, y_<t), with gradient when trained
    anchors: Mapping[str, Tensor]  # name -> [N, T], never with gradient; "reference" anchors the KL
    mask: Tensor  # [N, T] bool, True at trained tokens
    behavior: Tensor | None = None  # [N, T] log-probs of the policy that sampled the tokens
    # [N, T]: "entropy", "values", the plan's statistics
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def reference(self) -> Tensor:
        """The reference's log-probs [N, T]."""
        return self.anchors["reference"]

    @property
    def log_ratio(self) -> Tensor:
        """log policy - log reference per token [N, T]."""
        return self.policy - self.reference

    @property
    def lengths(self) -> Tensor:
        """Trained tokens per completion [N]."""
        return self.mask.sum(-1)

    def sequence(self, name: str = "policy") -> Tensor:
        """Sum over the trained tokens of `policy`, `behavior`, an anchor or an extra: [N]."""
        return masked_sum(self.get(name), self.mask)

    def get(self, name: str) -> Tensor:
        """`policy`, `behavior`, an anchor or an extra by name: [N, T]."""
        if name == "policy":
            return self.policy
        if name == "behavior":
            assert self.behavior is not None, "this batch has no behaviour log-probs"
            return self.behavior
        return self.anchors[name] if name in self.anchors else self.extras[name]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same record with `fn` applied to every tensor."""
        return replace(
            self,
            policy=fn(self.policy),
            anchors={k: fn(v) for k, v in self.anchors.items()},
            mask=fn(self.mask),
            behavior=None if self.behavior is None else fn(self.behavior),
            extras={k: fn(v) for k, v in self.extras.items()},
        )

    def select(self, index: Tensor) -> Self:
        """The completions at `index` [n]."""
        return self.map(lambda t: t[index])


@dataclass(frozen=True)
class Outputs:
    """What a reward or preference model gives for N whole completions: D numbers for each."""

    values: Tensor  # [N, D], with gradient when trained; D is `plan.outputs`


@dataclass(frozen=True)
class Term:
    """One summand of a loss, not reduced: its sum is divided by the step's global count of `unit`."""

    name: str
    values: Tensor  # [B] for rows; [N, T] (0 outside the mask) or [tokens] for tokens
    unit: Literal["rows", "tokens"] = "rows"
    weight: float = 1.0


@dataclass(frozen=True)
class LossTerms:
    """What an objective returns. Each metric is a tensor of any shape; the logged figure is the
    mean of its elements over the whole optimiser step and all ranks.
    """

    terms: Sequence[Term]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "LossTerms") -> "LossTerms":
        return LossTerms([*self.terms, *other.terms], {**self.metrics, **other.metrics})

    def scaled(self, weight: float) -> "LossTerms":
        """The same terms, each weight multiplied by `weight`."""
        return replace(self, terms=[replace(t, weight=t.weight * weight) for t in self.terms])


def _tables(bundles: Sequence[Bundle], device: torch.device) -> Tensor | None:
    """How often each completion of a prompt beats each other one, [B, K, K], where all were
    compared.
    """
    tables = [b.rows["table"] for b in bundles if "table" in b.rows]
    return torch.stack(tables).to(device) if tables else None


class _ByPrompt:
    """A row is a prompt with all its completions."""

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        """Rows and tokens that the terms of these bundles are divided by."""
        return {"rows": len(bundles), "tokens": sum(b.n_trained for b in bundles)}


@dataclass(frozen=True)
class SequenceBatch(_ByPrompt):
    """Demonstrations: one completion per prompt (N = B)."""

    completions_per_bundle: ClassVar[int | None] = 1
    tokens: TokenLogps

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        return cls(tokens)


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs: `chosen` and `rejected` answer the same prompts, [B, T] each."""

    completions_per_bundle: ClassVar[int | None] = 2
    chosen: TokenLogps
    rejected: TokenLogps
    # [B S, T] completions drawn beside each pair, where the plan asks for them
    sampled: TokenLogps | None = None
    # [B, 2 + S, 2 + S] P(completion i beats j): chosen, rejected, samples (plan.feedback == "table")
    table: Tensor | None = None

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        every = torch.arange(len(tokens.policy), device=tokens.policy.device).view(len(bundles), -1)
        beside = tokens.select(every[:, 2:].flatten()) if every.shape[1] > 2 else None
        return cls(
            tokens.select(every[:, 0]),
            tokens.select(every[:, 1]),
            beside,
            _tables(bundles, every.device),
        )

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        """Rows are pairs; tokens are the chosen completions' (the demonstrations of a likelihood
        term).
        """
        return {"rows": len(bundles), "tokens": sum(int(b.masks[0].sum()) for b in bundles)}

    def sequence_logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """policy_chosen, policy_rejected, reference_chosen, reference_rejected log-prob sums, [B]
        each.
        """
        chosen = self.chosen
        rejected = self.rejected
        return (
            chosen.sequence(),
            rejected.sequence(),
            chosen.sequence("reference"),
            rejected.sequence("reference"),
        )

    def rows(
        self,
        name: str,
        values: Tensor,
        *,
        scale: float = 1.0,
        rewards: tuple[Tensor, Tensor] | None = None,
    ) -> LossTerms:
        """One term of per-pair `values` [B] with TRL's metrics. The implicit rewards are `scale` *
        log-ratio unless `rewards` (chosen [B], rejected [B]) is given.
        """
        anchored = "reference" in self.chosen.anchors
        if rewards is None:
            pc = self.chosen.sequence()
            pr = self.rejected.sequence()
            rc, rr = (
                (self.chosen.sequence("reference"), self.rejected.sequence("reference"))
                if anchored
                else (0.0, 0.0)
            )
            rewards = (scale * (pc - rc), scale * (pr - rr))
        chosen, rejected = (r.detach() for r in rewards)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": self.chosen.sequence().detach(),
            "logps/rejected": self.rejected.sequence().detach(),
        }
        return LossTerms([Term(name, values)], metrics)


class _BestFirst(_ByPrompt):
    """The completions of each prompt come best first; a preference pair is a ranking of two."""

    sizes: Tensor  # [B] int64, completions of each prompt

    @staticmethod
    def sizes_of(bundles: Sequence[Bundle], device: torch.device) -> Tensor:
        """Completions of each bundle: [B]."""
        return torch.tensor([len(bundle.completions) for bundle in bundles], device=device)

    def ranked(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """One value per completion [N] -> [B, K], best first, 0 behind short rankings; and which
        are there, [B, K] bool.
        """
        mask = torch.arange(int(self.sizes.max()), device=values.device) < self.sizes.unsqueeze(-1)
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask


@dataclass(frozen=True)
class RankedBatch(_BestFirst):
    """Rankings under a language model: the log-probs of each prompt's completions, best first."""

    completions_per_bundle: ClassVar[int | None] = None
    tokens: TokenLogps  # [N, T]
    sizes: Tensor  # [B] int64

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        return cls(tokens, cls.sizes_of(bundles, tokens.policy.device))


@dataclass(frozen=True)
class ScoredBatch(_BestFirst):
    """Pairs or rankings under a reward or preference model: its outputs for each prompt's
    completions, best first.
    """

    outputs: Tensor  # [N, D]
    sizes: Tensor  # [B] int64

    @classmethod
    def build(cls, bundles: Sequence[Bundle], outputs: Outputs) -> Self:
        return cls(outputs.values, cls.sizes_of(bundles, outputs.values.device))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Outputs of the chosen and of the rejected completions of preference pairs, [B, D] each."""
        chosen, rejected = self.outputs.unflatten(0, (-1, 2)).unbind(1)
        return chosen, rejected


@dataclass(frozen=True)
class LabelledBatch:
    """Unpaired completions with a desirable/undesirable label; `mismatched` pairs prompts with
    other prompts' completions.
    """

    completions_per_bundle: ClassVar[int | None] = 1
    tokens: TokenLogps  # [B, T]
    labels: Tensor  # [B] bool, True = desirable
    mismatched: TokenLogps | None = None  # [B', T], no gradient needed

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device = tokens.policy.device
        shifted = torch.tensor([b.mismatched for b in bundles], device=device)
        labels = torch.tensor([bool(b.rows["label"][0]) for b in bundles], device=device)
        kept = (~shifted).nonzero()[:, 0]
        other = shifted.nonzero()[:, 0]
        return cls(tokens.select(kept), labels[kept], tokens.select(other) if len(other) else None)

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        matched = [b for b in bundles if not b.mismatched]
        return {"rows": len(matched), "tokens": sum(b.n_trained for b in matched)}


@dataclass(frozen=True)
class RolloutBatch:
    """Sampled completions with their scores; groups share a prompt. `credit` fills the advantages."""

    completions_per_bundle: ClassVar[int | None] = None
    tokens: TokenLogps  # [N, T] with `behavior`
    scores: Tensor  # [N] reward of each completion
    groups: Tensor  # [N] int64, equal for completions of one prompt
    advantages: Tensor | None = None  # [N, T] credit per token, filled by the objective's `credit`
    returns: Tensor | None = None  # [N, T] value targets
    values: Tensor | None = None  # [N, T] what the value head said at rollout time

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device, (_, length) = tokens.policy.device, tokens.policy.shape
        groups = torch.tensor(
            [i for i, b in enumerate(bundles) for _ in b.completions], device=device
        )

        def padded(name: str) -> Tensor | None:
            rows = [row for b in bundles for row in b.tokens.get(name, ())]
            if not rows:
                return None
            return torch.stack(
                [torch.nn.functional.pad(row, (0, length - len(row))) for row in rows]
            ).to(device)

        scores = torch.cat([b.rows["score"] for b in bundles]).to(device)
        return cls(
            tokens, scores, groups, padded("advantages"), padded("returns"), padded("values")
        )

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        return {
            "rows": sum(len(b.completions) for b in bundles),
            "tokens": sum(b.n_trained for b in bundles),
        }


@dataclass(frozen=True)
class GameBatch(_ByPrompt):
    """Self-play: K completions of each prompt and how often each beats the opponent the judge
    compared it with.
    """

    completions_per_bundle: ClassVar[int | None] = None
    completions: Sequence[TokenLogps]  # K x [B, T]
    # [B, K] probability that completion k beats the opponent (the last completion when none was set
    # aside)
    preference: Tensor
    # [B, K, K] probability that completion i beats completion j (plan.feedback == "table")
    table: Tensor | None = None

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device = tokens.policy.device
        per = len(bundles[0].completions)
        start = per * torch.arange(len(bundles), device=device)
        preference = torch.stack([b.rows["preference"] for b in bundles]).to(device)
        return cls(
            [tokens.select(start + k) for k in range(per)], preference, _tables(bundles, device)
        )


Batch = (
    SequenceBatch | PairBatch | RankedBatch | ScoredBatch | LabelledBatch | RolloutBatch | GameBatch
)
FAMILIES: dict[str, type[Any]] = {
    "sequence": SequenceBatch,
    "pair": PairBatch,
    "ranked": RankedBatch,
    "labelled": LabelledBatch,
    "rollout": RolloutBatch,
    "game": GameBatch,
}


def batch_type(plan: Plan) -> type[Any]:
    """The batch that an objective with this plan gets: `build(bundles, TokenLogps or Outputs)` makes
    one, `counts(bundles)` gives what its terms are divided by.
    """
    return ScoredBatch if plan.outputs else FAMILIES[plan.data]
