"""The plan: what an objective asks of the training loop, and all that the loop knows of an objective.

An objective never sees a model, and the loop never sees an objective's name. Between them stands a
`Plan`: which data the objective learns from, which completions are sampled for it, which models
score them and what is computed at each token. What the objective gives back are `LossTerms`.

Words, as everywhere in alignkit: the `policy` is trained; the `reference` anchors the KL; the
`behavior` policy sampled the tokens. An anchor is any model that scores completions without being
trained, the reference among them.

>>> dpo = Plan("pair")  # chosen and rejected completions, scored by the policy and the reference
>>> online_ipo = Plan("game", samples=(Draw(2),), feedback="pairwise")  # two answers, one verdict
>>> online_ipo.anchors
('reference',)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from alignkit.errors import ConfigError

# A number at each trained token that needs a model's whole next-token distribution. It is called
# inside the head, on one chunk of C tokens at a time, because the log-probs of a whole batch over
# the vocabulary would not fit into memory:
# (policy_logprobs [C, V], anchor_logprobs [C, V] or None, labels [C]) -> [C]
Statistic = Callable[[Tensor, Tensor | None, Tensor], Tensor]

# The kinds of data; `alignkit.batches.FAMILIES` says what belongs to each.
Family = Literal["sequence", "pair", "ranked", "labelled", "rollout", "game"]


@dataclass(frozen=True)
class Adaptive:
    """How the share of own answers grows during a run, and how long they are used."""

    # Added to the share, up to 1, when the held-out loss is `tolerance` or more above what it was at
    # the first evaluation, or at the last growth. 0: the share stays as it is.
    growth: float = 0.0
    tolerance: float = 0.1

    # So many of the last own answers are kept, and take the place of fresh ones: of none in the first
    # step, of nearly all in the last. 0: all are fresh.
    replay: int = 0


@dataclass(frozen=True)
class Draw:
    """Completions of each prompt that one policy samples: who draws, and how many.

    >>> Draw(2).models  # two from the policy
    {'policy': 1.0}
    """

    # Completions per prompt; None takes the recipe's `rollout.completions`.
    # Example: Draw() for a group of GRPO, Draw(1) for one answer of XPO.
    n: int | None = None

    # Who samples: "policy", "reference", the name of another anchor of the plan, or "proposal", an
    # earlier policy that is renewed when `credit` says so (`RolloutBatch.renewed`).
    # Example: Draw(1, source="reference") draws XPO's second answer.
    source: str = "policy"

    # Models that sample each token together, by name: the next token's log-probs are the sum of
    # weight * log-probs, normalised. Weights have any sign and any sum; empty is `source` alone.
    # Example: Draw(2, weights={"policy": 0.875, "reference": 0.125}) for IPO-MD.
    weights: Mapping[str, float] = field(default_factory=dict)

    # The source proposes each token and the teacher replaces it by one of its own where it is not
    # among the teacher's so many most likely ones; None: no teacher looks.
    # Example: Draw(1, top=25) for speculative knowledge distillation.
    top: int | None = None

    # Fixed data: with this probability the completion takes the place of the row's own answer;
    # None puts it beside it. Which rows these are follows from the seed and the step.
    # Example: Draw(1, share=0.5) for distillation on half of the policy's own answers.
    share: float | None = None

    # With a `share`: whether it grows, and whether own answers come back in later steps.
    # Example: Draw(1, share=0.0, adaptive=Adaptive(growth=0.1, replay=1000)) for DistiLLM.
    adaptive: Adaptive = Adaptive()

    # Whether a prompt's completions are drawn once and come back each time the prompt does. For a
    # source that does not move: they are a function of the seed and the prompt.
    # Example: Draw(1, source="reference", once=True) for the answers that DPH-RL rehearses.
    once: bool = False

    # Whether the objective sees these completions. False makes them opponents: the judge compares
    # the others with them, and then they are dropped.
    # Example: Draw(1, mix=0.125, scored=False) is Nash-MD's opponent.
    scored: bool = True

    @property
    def models(self) -> dict[str, float]:
        """The weight of every model that takes part, by name; those of weight 0 are left out.

        ConfigError for a weight that is not finite, or where nothing is left.
        """
        if self.top is not None:
            if self.weights or self.top < 1:
                raise ConfigError("a draw with `top`, at least 1, has a source and no weights")
            return {self.source: 1.0, "teacher": 1.0}
        if not self.weights:
            return {self.source: 1.0}
        for name, weight in self.weights.items():
            if not abs(weight) < float("inf"):
                raise ConfigError(f"the weight of {name} is {weight}; give a finite number")
        used = {name: float(weight) for name, weight in self.weights.items() if weight != 0}
        if not used:
            raise ConfigError(
                f"every weight of {', '.join(self.weights)} is 0; give at least one model a weight"
            )
        return used


@dataclass(frozen=True)
class Plan:
    """What an objective needs from the loop.

    Each field has a rule in `COMBINATION` below that says what a weighted list of objectives makes
    of it.
    """

    # What one row of training data is: "sequence" (demonstrations), "pair" (chosen and rejected),
    # "ranked" (several, best first), "labelled" (good or bad, unpaired), "rollout" (sampled and
    # scored by a reward) or "game" (sampled and compared by a judge).
    # Example: Plan("pair") for DPO, Plan("labelled") for KTO.
    data: Family

    # Name -> function of the next-token distributions at each trained token. The loss finds the
    # values [N, T] under that name in `TokenLogps.extras`. The second argument is the first anchor.
    # Example: {"forward_kl": forward_kl} for TDPO.
    statistics: Mapping[str, Statistic] = field(default_factory=dict)

    # Models beside the policy whose log-probs of the completions the loss reads: "reference",
    # "teacher" (the recipe's section of that name), "target" (an EMA or a copy synced every few
    # steps), "previous" (as "target", one sync older), or a name from `prefixes`.
    # Example: () for SimPO, ("teacher",) for distillation, ("reference", "target") for Nash-MP.
    anchors: tuple[str, ...] = ("reference",)

    # Completions that are sampled during training: of every prompt in online families, beside the
    # given completions in fixed ones.
    # Example: (Draw(2),) for online DPO.
    samples: tuple[Draw, ...] = ()

    # How sampled completions are judged: "none", "reward" (one number each), "pairwise" (the
    # probability [K] of beating the opponent) or "table" (of each beating each other one, [K, K]).
    # Example: "reward" for PPO, "pairwise" for Nash-MD, "table" for SPPO.
    feedback: Literal["none", "reward", "pairwise", "table"] = "none"

    # Whether a value head estimates the future reward at each token; the loss finds it [N, T] under
    # "values" in `TokenLogps.extras`.
    # Example: True for PPO.
    values: bool = False

    # Fixed data: whether the value at a completion's last token, the end token, is the reward of the
    # whole completion. The head is then saved beside the model, and rows without an end are refused.
    # Example: True for HAF-RM.
    rewards: bool = False

    # Whether the loss also reads how large the logits are: the log of the sum of their exponentials at
    # each token, [N, T] with gradient under "log_partition" in `TokenLogps.extras`.
    # Example: True for IQ-imitation, whose logits are soft action values.
    partition: bool = False

    # Bins of a second head, which gives at each token the law of the completion's reward, given the
    # tokens so far and this one; the loss finds the bins' log-probs [N, T] under "bin_0", "bin_1"
    # and so on in `TokenLogps.extras`. 0: no such head.
    # Example: 41 for a learned value.
    bins: int = 0

    # How often the same sampled completions are gone through before new ones are sampled.
    # Example: 4 for PPO as it is usually run, 1 for on-policy methods.
    epochs: int = 1

    # Optimiser steps into which one epoch over the sampled completions is divided.
    # Example: 4, so that 64 prompts are learnt from in four steps of 16.
    minibatches: int = 1

    # Whether `credit` reads log-probs of the policy, its entropy, values or statistics. Where it gets
    # by with scores, ids and masks, the pass over a rollout that computes them is left out.
    # Example: False for GRPO, True for RLOO, whose penalty is part of the score.
    credit_reads_policy: bool = True

    # Whether the loss of one row depends on the other rows of the optimiser step. The loop then
    # computes it on the log-probs of the whole step, gathered over all processes, not on
    # micro-batches.
    # Example: True for AOT, which sorts the step's margins.
    coupled: bool = False

    # Whether each prompt is also scored with another prompt's completion, without gradient.
    # Example: True for KTO, which estimates its baseline z0 from them.
    mismatched: bool = False

    # How one step moves the parameters: along the gradient, or along the gradient at the point that
    # such a step leads to.
    # Example: "extragradient" for EGPO.
    update: Literal["gradient", "extragradient"] = "gradient"

    # Numbers that a head gives for a whole completion; the loss then gets a `ScoredBatch` of them,
    # [N, outputs], instead of log-probs. 0: the policy is a language model.
    # Example: 1 for a reward model.
    outputs: int = 0

    # Anchor's name -> text. That anchor is the reference with the text put before the prompt; for
    # fixed data only.
    # Example: {"better": "Give a helpful answer.\n"} for T-REG.
    prefixes: Mapping[str, str] = field(default_factory=dict)

    # Whether the outputs are computed from both completions of a pair read at once, in either order.
    # Example: True for a preference model that compares two answers directly.
    joined: bool = False

    # Names of the statistics that read the policy's distributions alone. Where all of them do, no
    # anchor's distributions are computed for them, and the reference's log-probs may be stored.
    # Example: ("entropy",) for GRPO's entropy bonus.
    without_anchor: tuple[str, ...] = ()

    @property
    def read_by_statistics(self) -> str | None:
        """The anchor whose next-token distributions the statistics read: the first one."""
        reads = any(name not in self.without_anchor for name in self.statistics)
        return self.anchors[0] if reads and self.anchors else None

    @property
    def needs_teacher(self) -> bool:
        """Whether a run needs the recipe's teacher: to read its log-probs, or to sample from it."""
        return "teacher" in self.anchors or any("teacher" in d.models for d in self.samples)


@dataclass(frozen=True)
class Term:
    """One summand of a loss, not reduced: its sum is divided by the step's global count of `unit`."""

    name: str
    values: Tensor  # [B] for rows; [N, T] (0 outside the mask) or [tokens] for tokens
    unit: Literal["rows", "tokens"] = "rows"
    weight: float = 1.0


@dataclass(frozen=True)
class LossTerms:
    """What an objective returns. A logged metric is the mean over the elements of the whole step."""

    terms: Sequence[Term]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "LossTerms") -> "LossTerms":
        return LossTerms([*self.terms, *other.terms], {**self.metrics, **other.metrics})

    def scaled(self, weight: float) -> "LossTerms":
        """The same terms, each weight multiplied by `weight`."""
        return replace(self, terms=[replace(t, weight=t.weight * weight) for t in self.terms])


# What a weighted list of objectives makes of each field of its parts' plans.
#   family  one family; parts that learn from another one that it serves may join
#   agree   parts of that family must have the same value
#   union   everything that any part asks for; one name must not mean two things
#   names   the union of lists of names
#   anchors the union too, and the anchor that statistics read stays the first
#   any     whether any part asks for it
COMBINATION: dict[str, Literal["family", "agree", "union", "names", "anchors", "any"]] = {
    "data": "family",
    "statistics": "union",
    "without_anchor": "names",
    "anchors": "anchors",
    "samples": "agree",
    "feedback": "agree",
    "values": "agree",
    "rewards": "agree",
    "partition": "any",
    "bins": "agree",
    "epochs": "agree",
    "minibatches": "agree",
    "credit_reads_policy": "agree",
    "coupled": "any",
    "mismatched": "any",
    "update": "agree",
    "outputs": "agree",
    "prefixes": "union",
    "joined": "agree",
}


def combined(plans: Sequence[Plan], family: Family) -> Plan:
    """The plan of a weighted list of objectives from its parts' plans.

    Plans of another family than `family` (demonstrations beside pairs) add what they need, but have
    no say where all must agree. ConfigError where the parts contradict each other, and for a field
    that has no rule in `COMBINATION`.
    """
    leading = [plan for plan in plans if plan.data == family]
    values: dict[str, Any] = {}

    for name in (f.name for f in fields(plans[0])):
        rule = COMBINATION.get(name)
        if rule is None:
            raise ConfigError(
                f"Plan.{name} has no rule for weighted lists of objectives; "
                "add one to alignkit.plan.COMBINATION"
            )
        if rule == "family":
            values[name] = family
        elif rule == "agree":
            values[name] = _agreed(name, [getattr(plan, name) for plan in leading])
        elif rule == "union":
            values[name] = _union(name, [getattr(plan, name) for plan in plans])
        elif rule == "names":
            every = (entry for plan in plans for entry in getattr(plan, name))
            values[name] = tuple(dict.fromkeys(every))
        elif rule == "anchors":
            values[name] = _anchors(plans)
        else:
            values[name] = any(getattr(plan, name) for plan in plans)

    return type(plans[0])(**values)


def _agreed(name: str, values: Sequence[Any]) -> Any:
    """The one value that all parts have. ConfigError where they differ."""
    if any(value != values[0] for value in values):
        raise ConfigError(
            f"objective: the parts of a weighted list disagree on `{name}`; give each its own run"
        )
    return values[0]


def _union(name: str, mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All entries of the parts' mappings. ConfigError where a name has two meanings."""
    entries: dict[str, Any] = {}
    for key, entry in (item for mapping in mappings for item in mapping.items()):
        if key in entries and _comparable(entries[key]) != _comparable(entry):
            raise ConfigError(
                f"objective: two parts of a weighted list mean different things by `{key}` "
                f"in their plans' `{name}`; give each its own run"
            )
        entries[key] = entry
    return entries


def _anchors(plans: Sequence[Plan]) -> tuple[str, ...]:
    """All anchors, each once. ConfigError where the parts' statistics read different ones."""
    names = (plan.read_by_statistics for plan in plans)
    read_by_statistics = {name for name in names if name is not None}
    if len(read_by_statistics) > 1:
        raise ConfigError(
            "objective: the statistics of a weighted list read different anchors, "
            f"{' and '.join(sorted(read_by_statistics))}; give each part its own run"
        )
    every = (anchor for plan in plans for anchor in plan.anchors)
    return tuple(dict.fromkeys([*read_by_statistics, *every]))


def _comparable(entry: Any) -> Any:
    """`entry` in a form that is equal for equal functions with equal arguments: two `partial`
    objects never are.
    """
    return (entry.func, entry.args, entry.keywords) if isinstance(entry, partial) else entry
