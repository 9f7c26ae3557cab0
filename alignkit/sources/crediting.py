"""From the scores of a rollout to the advantages of its tokens: the objective's `credit`, asked on
the rollout of all processes, and what its bundles keep for the steps that learn from them.

Credit belongs to episodes. Where a rewritten history has cut one into several rows, its rows are
put behind one another for the objective and taken apart afterwards, so that a return runs on over
the cut and no mean counts an episode twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import FAMILIES, Bundle, Plan, RolloutBatch, TokenLogps
from alignkit.distributed.gather import concat, gather_rows
from alignkit.errors import NumericsError
from alignkit.objectives.base import Objective, State
from alignkit.policies.layout import stand_in
from alignkit.policies.pair import PolicyPair
from alignkit.rollout.importance import Correction, mismatch, own_rows
from alignkit.sources.bundle_io import with_channels
from alignkit.tensors import stacked

# What bundles carry per token -> the field of the rollout, and what stands where nothing does.
CHANNELS = {"turn": ("turns", -1), "state": ("states", 0), "reward": ("rewards", 0)}


@dataclass
class Crediting:
    """Puts into the tokens of a rollout's bundles what their loss reads: log-probs of the anchors
    and, where the objective gives credit, advantages.
    """

    objective: Objective
    pair: PolicyPair
    accelerator: Accelerator
    micro_batch_tokens: int

    # Set where another engine than the trainer's own model samples.
    correction: Correction | None = None

    state: State = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.objective.init_state()

    @property
    def plan(self) -> Plan:
        """What the objective asks for."""
        return self.objective.plan

    @torch.no_grad()
    def credited(self, bundles: Sequence[Bundle], *, lagging: bool) -> list[Bundle]:
        """The bundles of this rank, credited. `lagging` says that an earlier policy than the
        present one has sampled them, as it should be.

        Log-probs of the policy are computed where the credit reads them or an engine of its own has
        sampled. Otherwise those of the first bundle show whether sampler and trainer agree.
        """
        self.metrics = {}
        chunks = self.pair.micro_batches(bundles, self.micro_batch_tokens)
        order = [i for chunk in chunks for i in chunk]
        ordered = [bundles[i] for i in order]

        gives_credit = FAMILIES[self.plan.data].credited
        reads_policy = gives_credit and self.plan.credit_reads_policy
        asked = reads_policy or self.correction is not None
        again = self.plan.minibatches == 1  # then the loss has the same micro-batches
        logps = partial(self.pair.logps, plan=self.plan, again=again)
        known = logps if asked else partial(self.pair.known_logps, plan=self.plan)
        with self.pair.together():  # ranks may have different numbers of chunks
            parts = [known([bundles[i] for i in chunk]) for chunk in chunks]
            tokens = concat(parts or [known([self._unsampled()]).map(lambda t: t[:0])])
            compared = tokens if asked else self._first(ordered)

        of_these = ordered if asked else ordered[:1]
        own = compared.select(own_rows(self.plan, of_these).to(compared.mask.device))
        self.metrics |= mismatch(own, self.accelerator)

        # Statistics are computed with the gradient later, and their anchors with them.
        channels = dict(tokens.anchors) if self.plan.read_by_statistics is None else {}
        if self.correction is not None:
            if not lagging:
                self.correction.check(self.metrics)
            ordered, weights = self.correction.weigh(ordered, tokens, self.accelerator)
            self.metrics |= weights
            # The weights account for the engine, so that an objective's own ratio starts at 1.
            tokens = replace(tokens, behavior=tokens.policy)
            channels["behavior"] = tokens.policy
        if gives_credit:
            channels |= self._advantages(ordered, tokens)

        results = dict(zip(order, with_channels(ordered, channels)))
        return [results[i] for i in range(len(bundles))]

    def _first(self, bundles: Sequence[Bundle]) -> TokenLogps:
        """The policy's log-probs of the first bundle; of no completion where there is none."""
        some = self.pair.logps([*bundles[:1]] or [self._unsampled()], self.plan, anchors=False)
        return some if bundles else some.map(lambda t: t[:0])

    def _unsampled(self) -> Bundle:
        """A bundle with the channels that other ranks have, where every one of this rank was
        dropped.
        """
        return replace(stand_in(), tokens={"behavior": [torch.zeros(1)]})

    def _advantages(self, bundles: Sequence[Bundle], tokens: TokenLogps) -> dict[str, Tensor]:
        """The objective's credit of the global rollout: this rank's part of it, [N, T] each."""
        channels, self.state, renewed = advantages(
            self.objective, self.state, bundles, tokens, self.accelerator
        )
        for name in renewed:
            self.pair.anchors[name].renew(self.pair.base)
        self.metrics |= state_metrics(self.state)
        return channels


def advantages(
    objective: Objective,
    state: State,
    bundles: Sequence[Bundle],
    tokens: TokenLogps,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], State, tuple[str, ...]]:
    """The objective's credit of the global rollout: this rank's part of it, [N, T] each, the
    objective's next state, and the anchors that are to become the policy now.

    `tokens` are the log-probs of the N completions of `bundles`. NumericsError where an advantage
    is not finite.
    """
    device = tokens.policy.device
    channels = _channels(bundles, tokens)
    gathered, offset = gather_rows(
        replace(tokens, extras={**tokens.extras, **channels}), accelerator
    )
    everyone = replace(gathered, extras={name: gathered.extras[name] for name in tokens.extras})
    rows = {name: values for name, values in _gathered_rows(bundles).items() if values}
    own_channels: dict[str, Any] = {
        field: gathered.extras.get(field) for field, _ in CHANNELS.values()
    }

    rollout = RolloutBatch(
        everyone,
        torch.tensor(rows.get("score", []), dtype=torch.float64, device=device),
        torch.tensor(rows.get("group", []), dtype=torch.int64, device=device),
        draws=torch.tensor(rows["draw"], device=device) if "draw" in rows else None,
        ids=gathered.extras["ids"],
        **own_channels,
    )
    episodes = Episodes.of(rows.get("episode"), rows.get("segment"), device)
    credited, state = objective.credit(episodes.joined(rollout), state)

    own_rows = slice(offset, offset + len(tokens.policy))
    results = {
        "advantages": credited.advantages,
        "returns": credited.returns,
        "values": credited.values,
        "weights": credited.weights,
    }
    own = {
        name: _narrowed(name, episodes.apart(value), rollout)[own_rows]
        for name, value in results.items()
        if value is not None
    }
    return own, state, credited.renewed


def state_metrics(state: State) -> dict[str, float]:
    """The numbers among what an objective carries from step to step, as they are logged."""
    return {f"credit/{name}": float(v) for name, v in state.items() if v.numel() == 1}


class Episodes:
    """Which rows belong to one episode, in time. Without cuts every row is one."""

    def __init__(self, table: Tensor | None) -> None:
        self.table = table  # [E, S] int64 rows of each episode, -1 behind the last; None: no cuts

    @classmethod
    def of(
        cls, episodes: Sequence[int] | None, segments: Sequence[int] | None, device: Any
    ) -> "Episodes":
        """From the episode and the segment of each row."""
        if episodes is None or segments is None or not any(segments):
            return cls(None)
        numbers = {episode: i for i, episode in enumerate(dict.fromkeys(episodes))}
        table = torch.full((len(numbers), max(segments) + 1), -1, dtype=torch.int64)
        for row, (episode, segment) in enumerate(zip(episodes, segments, strict=True)):
            table[numbers[episode], segment] = row
        return cls(table.to(device))

    def joined(self, rollout: RolloutBatch) -> RolloutBatch:
        """One row per episode, its segments behind one another."""
        if self.table is None:
            return rollout
        table = self.table

        def join(values: Tensor) -> Tensor:
            padded = torch.cat([values, torch.zeros_like(values[:1])])  # row -1
            return padded[table].flatten(1, 2)

        turns = rollout.turns
        first = table[:, 0]
        tokens = rollout.tokens.map(join)
        return replace(
            rollout,
            tokens=tokens,
            scores=rollout.scores[first],
            groups=rollout.groups[first],
            draws=None if rollout.draws is None else rollout.draws[first],
            ids=None if rollout.ids is None else join(rollout.ids),
            turns=None if turns is None else torch.where(tokens.mask, join(turns), -1),
            states=None if rollout.states is None else join(rollout.states),
            rewards=None if rollout.rewards is None else join(rollout.rewards),
        )

    def apart(self, values: Tensor) -> Tensor:
        """The inverse, for what `credit` gave: [E, S T] -> [N, T]."""
        if self.table is None:
            return values
        cut = values.unflatten(1, (self.table.shape[1], -1))
        there = self.table >= 0
        rows = torch.empty_like(cut[there])
        rows[self.table[there]] = cut[there]
        return rows


def _channels(bundles: Sequence[Bundle], tokens: TokenLogps) -> dict[str, Tensor]:
    """Ids and, where all bundles have them, turns, states and rewards: [N, T] each."""
    length = tokens.policy.shape[1]

    def padded(rows: Sequence[Tensor], filling: float, dtype: torch.dtype) -> Tensor:
        full = stacked(rows, length, filling) if rows else torch.zeros((0, length), dtype=dtype)
        return full.to(tokens.policy.device)

    ids = [row for bundle in bundles for row in bundle.completions]
    channels = {"ids": padded(ids, 0, torch.int64)}
    given = gather_object([[name for name in CHANNELS if name in b.tokens] for b in bundles])
    for name, (kind, filling) in CHANNELS.items():
        if not any(name in names for names in given):
            continue
        rows = [row for bundle in bundles for row in bundle.tokens[name]]
        dtype = torch.float64 if name == "reward" else torch.int64
        channels[kind] = padded(rows, filling, dtype)
    return channels


def _gathered_rows(bundles: Sequence[Bundle]) -> dict[str, list[Any]]:
    """One number per completion, of all ranks; completions of one prompt have one group."""
    names = ("draw", "episode", "segment", "group")
    own: list[dict[str, Any]] = [
        {"score": RolloutBatch.scores_of(bundle).tolist()}
        | {name: bundle.rows[name].tolist() for name in names if name in bundle.rows}
        for bundle in bundles
    ]
    rows: dict[str, list[Any]] = {name: [] for name in ("score", *names)}
    for number, values in enumerate(gather_object(own)):
        values.setdefault("group", [number] * len(values["score"]))
        for name, entries in values.items():
            rows[name] += entries
    return rows


def _narrowed(name: str, values: Tensor, rollout: RolloutBatch) -> Tensor:
    """What `credit` computed in float64 [N, T], in the dtype of the log-probs. NumericsError where
    it is not finite there, with the scores that led to it.
    """
    narrow = values.to(rollout.tokens.policy.dtype)
    rows = (~narrow.isfinite()).flatten(1).any(-1).nonzero()[:, 0].tolist()
    if not rows:
        return narrow

    group = rollout.scores[rollout.groups == rollout.groups[rows[0]]].tolist()
    listed = ", ".join(f"{score:.6g}" for score in group[:8])
    raise NumericsError(
        f"the {name} of {len(rows)} of {len(narrow)} completions are not finite in "
        f"{str(narrow.dtype).removeprefix('torch.')}; the first one's prompt has the scores "
        f"{listed}{', ...' if len(group) > 8 else ''}. Nothing was updated; scale the reward down "
        "(its `weight`), or mend it"
    )
