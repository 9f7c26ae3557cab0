"""The data that objectives and the loop exchange: bundles in, log-probs through, loss terms out.

    Bundle (data)  ->  TokenLogps (the models)  ->  Batch (by family)  ->  LossTerms (the objective)

Reward and preference models have no log-probs: for them `Outputs` stands where `TokenLogps` stands
for language models.

Axes: B pairs or prompts, K completions of one prompt, N completions of a whole batch, T tokens,
V vocabulary. Log-probs are natural logarithms, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from alignkit.plan import Adaptive as Adaptive
from alignkit.plan import Draw as Draw
from alignkit.plan import Family as Family
from alignkit.plan import LossTerms as LossTerms
from alignkit.plan import Plan as Plan
from alignkit.plan import Statistic as Statistic
from alignkit.plan import Term as Term
from alignkit.tensors import Outputs as Outputs
from alignkit.tensors import TokenLogps as TokenLogps
from alignkit.tensors import stacked

TwoTensors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bundle:
    """One prompt with K completions. All tensors live on the CPU until the layout moves them.

    A demonstration has K = 1, a pair K = 2 (chosen, rejected), a rollout one completion per sample.
    """

    prompt: Tensor  # [P] int64, at least one token
    completions: Sequence[Tensor]  # K x [T_k] int64
    masks: Sequence[Tensor]  # K x [T_k] bool: which tokens are trained; may have holes (dialogues)
    uid: str = ""  # where the row comes from ("preferences.jsonl:17"); named in errors
    # Name -> [K], one number per completion: "label", "score", "preference", ...; "table" is [K, K].
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    # Name -> K x [T_k], one number per token: "behavior", an anchor's stored log-probs,
    # "advantages", "returns", ...
    tokens: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    # This prompt with another prompt's completion (KTO's z0); never trained on.
    mismatched: bool = False

    @property
    def n_trained(self) -> int:
        """Trained tokens over all completions."""
        return sum(int(mask.sum()) for mask in self.masks)

    @property
    def n_tokens(self) -> int:
        """Tokens the shared-prefix layout computes for this bundle."""
        return len(self.prompt) + sum(len(ids) for ids in self.completions)


def whole_lengths(bundles: Sequence[Bundle], device: torch.device) -> Tensor | None:
    """`TokenLogps.whole_lengths` of the completions of these bundles; None where they have none."""
    if not all("episode_tokens" in bundle.rows for bundle in bundles):
        return None
    return torch.cat([bundle.rows["episode_tokens"] for bundle in bundles]).to(device)


def _tables(bundles: Sequence[Bundle], device: torch.device) -> Tensor | None:
    """Probabilities that completion i of a prompt beats j, [B, K, K]; None if not all were judged."""
    tables = [b.rows["table"] for b in bundles if "table" in b.rows]
    return torch.stack(tables).to(device) if tables else None


def _draws(bundles: Sequence[Bundle], device: torch.device) -> Tensor | None:
    """Which of the plan's draws each completion is from, [N]; None where the bundles do not say."""
    if not all("draw" in bundle.rows for bundle in bundles):
        return None
    return torch.cat([bundle.rows["draw"] for bundle in bundles]).to(device)


def _log_ratio(tokens: TokenLogps) -> Tensor:
    """log policy - log reference of whole completions [N]; log policy where nothing anchors it."""
    reference = tokens.sequence("reference") if "reference" in tokens.anchors else 0.0
    return tokens.sequence() - reference


class _ByPrompt:
    """A row is a prompt with all its completions."""

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        """Rows and tokens that the terms of these bundles are divided by."""
        return {"rows": len(bundles), "tokens": sum(b.n_trained for b in bundles)}


@dataclass(frozen=True)
class SequenceBatch(_ByPrompt):
    """Demonstrations: one completion per prompt (N = B)."""

    tokens: TokenLogps
    # [B] int64, the draw of the plan that took the place of the row's answer; -1: its own answer.
    # None: all answers are the rows' own.
    draws: Tensor | None = None

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        return cls(tokens, _draws(bundles, tokens.policy.device))


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs: `chosen` and `rejected` answer the same prompts, [B, T] each."""

    chosen: TokenLogps
    rejected: TokenLogps
    # [B S, T] completions drawn beside each pair, where the plan asks for them
    sampled: TokenLogps | None = None
    # [B, 2 + S, 2 + S] P(completion i beats j): chosen, rejected, samples (plan.feedback == "table")
    table: Tensor | None = None

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device = tokens.policy.device
        rows = torch.arange(len(tokens.policy), device=device).view(len(bundles), -1)  # [B, 2 + S]
        return cls(
            chosen=tokens.select(rows[:, 0]),
            rejected=tokens.select(rows[:, 1]),
            sampled=tokens.select(rows[:, 2:].flatten()) if rows.shape[1] > 2 else None,
            table=_tables(bundles, device),
        )

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        """Rows are pairs; tokens are the chosen completions', which a likelihood term learns."""
        return {"rows": len(bundles), "tokens": sum(int(b.masks[0].sum()) for b in bundles)}

    def sequence_logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The policy's log-probs of chosen and rejected, then the reference's: [B] each."""
        return (
            self.chosen.sequence(),
            self.rejected.sequence(),
            self.chosen.sequence("reference"),
            self.rejected.sequence("reference"),
        )

    def rows(
        self, name: str, values: Tensor, *, scale: float = 1.0, rewards: TwoTensors | None = None
    ) -> LossTerms:
        """One loss term of per-pair `values` [B], with TRL's metrics.

        The implicit rewards are `rewards` (chosen [B], rejected [B]), by default `scale` times the
        log-ratio to the reference, or times the policy's log-prob where there is no reference.
        """
        if rewards is None:
            rewards = (scale * _log_ratio(self.chosen), scale * _log_ratio(self.rejected))
        chosen, rejected = (reward.detach() for reward in rewards)

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

    def ranked(self, values: Tensor) -> TwoTensors:
        """[N], a value per completion -> [B, K], 0 after short rankings; which are there, [B, K]."""
        mask = torch.arange(int(self.sizes.max()), device=values.device) < self.sizes.unsqueeze(-1)
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask


@dataclass(frozen=True)
class RankedBatch(_BestFirst):
    """Rankings under a language model: the log-probs of each prompt's completions, best first."""

    tokens: TokenLogps  # [N, T]
    sizes: Tensor  # [B] int64

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        return cls(tokens, cls.sizes_of(bundles, tokens.policy.device))


@dataclass(frozen=True)
class ScoredBatch(_BestFirst):
    """Pairs, rankings or labelled completions under a reward or preference model: its outputs, of
    pairs and rankings the best completion first.
    """

    outputs: Tensor  # [N, D]
    sizes: Tensor  # [B] int64
    # [B] by how much the better completion of a pair is to lead, 0 where its row says nothing. None:
    # no row of the batch says anything.
    margins: Tensor | None = None
    labels: Tensor | None = None  # [N] bool, of labelled completions: whether they are right

    @classmethod
    def build(cls, bundles: Sequence[Bundle], outputs: Outputs) -> Self:
        values = outputs.values
        labels = None
        if all("label" in bundle.rows for bundle in bundles):
            labels = torch.tensor([bool(b.rows["label"][0]) for b in bundles], device=values.device)
        margins = None
        if any("margin" in bundle.rows for bundle in bundles):
            given = [float(bundle.rows.get("margin", 0.0)) for bundle in bundles]
            margins = torch.tensor(given, dtype=values.dtype, device=values.device)
        return cls(values, cls.sizes_of(bundles, values.device), margins, labels)

    def pairs(self) -> TwoTensors:
        """Outputs of the chosen and of the rejected completions of preference pairs, [B, D] each."""
        chosen, rejected = self.outputs.unflatten(0, (-1, 2)).unbind(1)
        return chosen, rejected


@dataclass(frozen=True)
class LabelledBatch:
    """Unpaired completions, each labelled desirable or not."""

    tokens: TokenLogps  # [B, T]
    labels: Tensor  # [B] bool, True = desirable
    mismatched: TokenLogps | None = None  # [B', T] prompts with other prompts' completions

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device = tokens.policy.device
        shifted = torch.tensor([b.mismatched for b in bundles], device=device)
        labels = torch.tensor([bool(b.rows["label"][0]) for b in bundles], device=device)
        matched = (~shifted).nonzero()[:, 0]
        mismatched = shifted.nonzero()[:, 0]
        return cls(
            tokens=tokens.select(matched),
            labels=labels[matched],
            mismatched=tokens.select(mismatched) if len(mismatched) else None,
        )

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        matched = [b for b in bundles if not b.mismatched]
        return {"rows": len(matched), "tokens": sum(b.n_trained for b in matched)}


@dataclass(frozen=True)
class RolloutBatch:
    """Sampled completions with their scores; groups share a prompt. `credit` fills the advantages."""

    tokens: TokenLogps  # [N, T] with `behavior`
    scores: Tensor  # [N] reward of each completion; 0 where nothing scores them
    groups: Tensor  # [N] int64, equal for completions of one prompt
    advantages: Tensor | None = None  # [N, T] credit per token, filled by the objective's `credit`
    returns: Tensor | None = None  # [N, T] value targets
    values: Tensor | None = None  # [N, T] what the value head said at rollout time
    weights: Tensor | None = None  # [N, T] weight of the KL per token, filled by `credit`
    draws: Tensor | None = None  # [N] int64, which of the plan's draws; None: it has one

    # For `credit`, which gets one row per episode. None: completions of one turn each.
    ids: Tensor | None = None  # [N, T] int64 the tokens; what stands outside the mask is not own
    turns: Tensor | None = None  # [N, T] int64 number of the turn; -1 at tokens that are not own
    states: Tensor | None = None  # [N, T] int64 key of the state in which the turn was taken
    rewards: Tensor | None = None  # [N, T] at the last own token of a turn; they add up to `scores`

    # Anchors that `credit` wants to become the policy as it is now, before the next step: those of
    # kind "asked", such as an adaptive proposal.
    renewed: tuple[str, ...] = ()

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device = tokens.policy.device
        length = tokens.policy.shape[1]
        groups = [i for i, bundle in enumerate(bundles) for _ in bundle.completions]
        ids = [row for bundle in bundles for row in bundle.completions]

        def padded(name: str, filling: int = 0) -> Tensor | None:
            rows = [row for bundle in bundles for row in bundle.tokens.get(name, ())]
            return stacked(rows, length, filling).to(device) if rows else None

        return cls(
            tokens,
            scores=torch.cat([cls.scores_of(bundle) for bundle in bundles]).to(device),
            groups=torch.tensor(groups, device=device),
            advantages=padded("advantages"),
            returns=padded("returns"),
            values=padded("values"),
            weights=padded("weights"),
            draws=_draws(bundles, device),
            ids=stacked(ids, length).to(device),
            turns=padded("turn", -1),
            states=padded("state"),
            rewards=padded("reward"),
        )

    def drawn_by(self, draw: int) -> Tensor:
        """Which completions are from the plan's draw of that number: [N] bool."""
        draws = torch.zeros_like(self.groups) if self.draws is None else self.draws
        return draws == draw

    @staticmethod
    def scores_of(bundle: Bundle) -> Tensor:
        """The score of each completion of a bundle, [K]; 0 where nothing scores them."""
        unscored = torch.zeros(len(bundle.completions), dtype=torch.float64)
        return bundle.rows.get("score", unscored)

    @staticmethod
    def counts(bundles: Sequence[Bundle]) -> dict[str, int]:
        """Rows are episodes: one that was cut into several segments counts with its first."""
        rows = sum(
            int((b.rows["segment"] == 0).sum()) if "segment" in b.rows else len(b.completions)
            for b in bundles
        )
        return {"rows": rows, "tokens": sum(b.n_trained for b in bundles)}


@dataclass(frozen=True)
class GameBatch(_ByPrompt):
    """Self-play: K completions of each prompt, and how often each beats its opponent."""

    completions: Sequence[TokenLogps]  # K x [B, T]
    # [B, K] probability that completion k beats the opponent: a draw that the plan does not score,
    # or else the last completion.
    preference: Tensor
    # [B, K, K] probability that completion i beats completion j (plan.feedback == "table")
    table: Tensor | None = None

    @classmethod
    def build(cls, bundles: Sequence[Bundle], tokens: TokenLogps) -> Self:
        device = tokens.policy.device
        count = len(bundles[0].completions)
        first_rows = count * torch.arange(len(bundles), device=device)
        return cls(
            completions=[tokens.select(first_rows + k) for k in range(count)],
            preference=torch.stack([b.rows["preference"] for b in bundles]).to(device),
            table=_tables(bundles, device),
        )


Batch = (
    SequenceBatch | PairBatch | RankedBatch | ScoredBatch | LabelledBatch | RolloutBatch | GameBatch
)


@dataclass(frozen=True)
class DataFamily:
    """What belongs to a family of training data: asked wherever families are treated differently."""

    batch: type[Batch]  # what objectives on language models get
    sampled: bool = False  # completions are sampled during training; the data are prompts alone
    credited: bool = False  # the objective's `credit` makes advantages of a whole rollout's scores
    serves: tuple[Family, ...] = ()  # families whose objectives can learn from these batches too


FAMILIES: dict[Family, DataFamily] = {
    "sequence": DataFamily(SequenceBatch),
    "pair": DataFamily(PairBatch, serves=("sequence",)),
    "ranked": DataFamily(RankedBatch),
    "labelled": DataFamily(LabelledBatch),
    "rollout": DataFamily(RolloutBatch, sampled=True, credited=True),
    "game": DataFamily(GameBatch, sampled=True),
}


def batch_type(plan: Plan) -> type[Any]:
    """The batch that an objective with this plan gets, from TokenLogps or, with outputs, Outputs."""
    return ScoredBatch if plan.outputs else FAMILIES[plan.data].batch
