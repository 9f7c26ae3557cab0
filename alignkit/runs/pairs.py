"""Preference pairs from any model and reward: sample, score, label, write. Iterative DPO is this
and `train` in turn.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from alignkit import files
from alignkit.config.iterate import PairMethod
from alignkit.config.rewards import RewardConfig
from alignkit.data.prompts import Prompt
from alignkit.errors import ConfigError, DataError
from alignkit.rewards.call import RewardCall, Score, call_reward
from alignkit.rewards.ensemble import most_disputed
from alignkit.rewards.load import load_ensemble, load_reward_model, load_rewards
from alignkit.rewards.model import RewardModel
from alignkit.rollout.text import as_reply, decode, decode_after
from alignkit.runs.sampled_answers import sample_answers
from alignkit.tasks import Task

Pick = tuple[int, int]  # the better completion's place among a prompt's, and the worse one's


@dataclass(frozen=True)
class PairRequest:
    """What to make: `samples` completions of each prompt, from them up to `pairs` labelled pairs.

    bradley_terry: pairs in the order drawn, the first wins with probability sigmoid(difference /
    label_temperature), 0: the higher score does. best_worst: highest against lowest score, one
    pair. rejection: the completions are first thinned to samples of model * exp(score / beta)
    (RSO), then paired and labelled as in bradley_terry. tree: half of the completions fork somewhere
    on their way; the two ends of a fork are labelled as in bradley_terry.
    """

    model: str
    prompts: str  # a file, a data set, or task:NAME
    # FILE.py:NAME, module:NAME, a reward model, or a recipe's rewards; None: the task's own
    reward: str | Sequence[RewardConfig] | None = None
    method: PairMethod = "bradley_terry"
    samples: int = 4
    pairs: int = 1
    label_temperature: float = 1.0
    beta: float = 0.5
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    safe: bool = False
    # Reward models; the reward is asked about those pairs alone on which they disagree most.
    active: Sequence[str] = ()
    # A reward model; the reward is asked about pairs of its best and worst completions alone.
    student: str | None = None

    def __post_init__(self) -> None:
        if self.student is not None and (self.active or self.method != "bradley_terry"):
            other = "--active" if self.active else f"the method {self.method}"
            raise ConfigError(
                f"pairs: a student proposes the pairs, and {other} would choose them otherwise; take "
                "the method bradley_terry, without --active"
            )
        if self.active and (len(self.active) < 2 or self.method != "bradley_terry"):
            raise ConfigError(
                f"pairs: --active with {len(self.active)} reward models and the method "
                f"{self.method}; give it at least twice, with bradley_terry"
            )

        if self.method == "tree" and (self.samples < 4 or self.samples % 2):
            raise ConfigError(
                f"pairs: the method tree with {self.samples} samples; give an even number of at least 4"
            )
        in_range = (
            self.samples >= 2 and self.pairs >= 1 and self.beta > 0 and self.label_temperature >= 0
        )
        if not in_range:
            raise ConfigError(
                f"pairs: samples {self.samples} (at least 2), pairs {self.pairs} (at least 1), "
                f"beta {self.beta} (above 0), label_temperature {self.label_temperature} "
                "(at least 0): one of them is out of its range"
            )


@dataclass(frozen=True)
class Answers:
    """A prompt with its completions and their scores; None: the reward does not apply."""

    prompt: Prompt
    texts: list[str]
    scores: list[Score]


def make_pairs(request: PairRequest, to: Path) -> Counter[str]:
    """Write the pairs to `to` (JSON lines: prompt, chosen, rejected, chosen_score, rejected_score)
    and return how many prompts, completions and pairs there were.

    The file appears whole or not at all. ConfigError where it exists or there is no reward,
    DataError where no pair is left, ResourceError where the disk refuses.
    """
    if to.exists():
        raise ConfigError(f"{to} exists already; name another file")

    counts: Counter[str] = Counter()
    answers = _answers(request, counts)
    rows = _rows(request, answers, counts)
    if not rows:
        listed = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise DataError(
            f"pairs: no pair is left ({listed}); draw more samples, raise the temperature, "
            "or check the reward"
        )

    with files.writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        files.write_jsonl(to, rows)
    return counts


def _answers(request: PairRequest, counts: Counter[str]) -> list[Answers]:
    """Every prompt with its sampled and scored completions."""
    student = _student(request)
    answers = sample_answers(request, forks=request.method == "tree")
    texts = [
        [_text(answers.tokenizer, prompt, sample.ids) for sample in samples]
        for prompt, samples in zip(answers.prompts, answers.samples)
    ]

    counts["prompts"] = len(answers.prompts)
    counts["prompts dropped"] = answers.dropped
    counts["completions"] = sum(map(len, texts))
    counts["cut at max_new_tokens"] = sum(
        not sample.ended for samples in answers.samples for sample in samples
    )

    replies = [
        [as_reply(prompt.text, text) for text in row] for prompt, row in zip(answers.prompts, texts)
    ]
    reward = _reward(request, answers.task)
    asked: Sequence[Sequence[int]] = [range(len(row)) for row in texts]
    if request.active:
        asked = _disputed(request, answers.prompts, texts, replies)
    elif student is not None:
        asked = _proposed(student, request.pairs, answers.prompts, texts, replies)

    # Only completions of the pairs that are asked about are scored.
    scores = call_reward(reward, answers.prompts, *_at(asked, replies, answers.ids))
    counts["completions scored"] = sum(map(len, asked))
    chosen = _at(asked, texts)[0]
    return [Answers(*answer) for answer in zip(answers.prompts, chosen, scores)]


def _at(places: Sequence[Sequence[int]], *lists: Sequence[Sequence[Any]]) -> list[list[list[Any]]]:
    """The entries at each prompt's places, of each of the lists."""
    return [[[row[i] for i in at] for row, at in zip(rows, places)] for rows in lists]


def _disputed(
    request: PairRequest,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    replies: Sequence[Sequence[Any]],
) -> list[list[int]]:
    """The places of the completions of each prompt's `request.pairs` most disputed pairs, one pair
    behind the other; no completion is in two of them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ensemble = load_ensemble(request.active, device=device)
    asked = []
    for prompt, row, completions in zip(prompts, texts, replies):
        scores = ensemble.scores([prompt.text] * len(completions), completions)
        usable = [place for place, text in enumerate(row) if text.strip()]
        pairs = [(i, j) for i, j in combinations(usable, 2) if row[i] != row[j]]

        places: list[int] = []
        for pair in most_disputed(scores, pairs, len(pairs)):
            if len(places) < 2 * request.pairs and not set(pair) & set(places):
                places += pair
        asked.append(places)
    return asked


def _student(request: PairRequest) -> RewardModel | None:
    """The reward model that proposes pairs, where there is one."""
    if request.student is None:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_reward_model(request.student, device=device, field="student")


def _proposed(
    student: RewardModel,
    pairs: int,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    replies: Sequence[Sequence[Any]],
) -> list[list[int]]:
    """The places of the completions of each prompt's pairs that the student proposes: the highest
    score before the lowest, the second highest before the second lowest, at most `pairs` of them.
    """
    asked = []
    for prompt, row, completions in zip(prompts, texts, replies):
        scores = student([prompt.text] * len(completions), completions)
        usable = [place for place, text in enumerate(row) if text.strip()]
        order = sorted(usable, key=scores.__getitem__)
        both = zip(order[::-1], order[: len(order) // 2])
        proposed = [pair for pair in both if row[pair[0]] != row[pair[1]]]
        asked.append([place for pair in proposed[:pairs] for place in pair])
    return asked


def _text(tokenizer: Any, prompt: Prompt, ids: Tensor) -> str:
    """A completion as it is written to the file, where a plain prompt is followed by it directly."""
    if isinstance(prompt.text, str):
        return decode_after(tokenizer, prompt.ids, ids)
    return decode(tokenizer, ids)


def _reward(request: PairRequest, task: Task | None) -> RewardCall:
    """The reward that the request names, else the task's own."""
    given = request.reward
    if given:
        if isinstance(given, str):
            sections: Sequence[Any] = [{"function" if ":" in given else "model": given}]
        else:
            sections = given
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_rewards(sections, safe=request.safe, device=device)
    if task is not None and task.reward is not None:
        return task.reward
    raise ConfigError(
        "pairs: no reward; name one with --reward FILE.py:NAME or a reward model's folder"
    )


def _rows(
    request: PairRequest, answers: Sequence[Answers], counts: Counter[str]
) -> list[dict[str, Any]]:
    """The pairs as rows of the file; what is left out on the way is counted."""
    generator = Generator().manual_seed(request.seed)
    proposed = request.student is not None
    two_by_two = request.method == "tree" or bool(request.active) or proposed
    rows: list[dict[str, Any]] = []
    for answer in answers:
        usable = _usable(answer, two_by_two=two_by_two)
        counts["empty or without a score"] += len(answer.texts) - len(usable)

        picks: list[Pick] = []
        if len(usable) > 1:
            picks = label([score for _, score in usable], request, generator)
        counts["prompts without a pair"] += not picks

        for better, worse in picks:
            chosen, chosen_score = usable[better]
            rejected, rejected_score = usable[worse]
            if chosen == rejected:
                counts["pairs of equal texts left out"] += 1
                continue
            # In a student's pairs the completion that it holds for the better one comes first.
            if proposed and better > worse:
                counts["pairs labelled against the student"] += 1
            rows.append(
                {
                    "prompt": answer.prompt.text,
                    "chosen": chosen,
                    "rejected": rejected,
                    "chosen_score": chosen_score,
                    "rejected_score": rejected_score,
                }
            )
    counts["pairs written"] = len(rows)
    return rows


def _usable(answer: Answers, *, two_by_two: bool) -> list[tuple[str, float]]:
    """The completions that have a text and a score. Where they are meant to be compared two by two,
    a completion leaves together with its partner.
    """
    entries = [
        (text, score) if score is not None and text.strip() else None
        for text, score in zip(answer.texts, answer.scores)
    ]
    if two_by_two:
        partners = zip(entries[::2], entries[1::2])
        entries = [entry for both in partners if all(both) for entry in both]
    return [entry for entry in entries if entry is not None]


def label(scores: Sequence[float], request: PairRequest, generator: Generator) -> list[Pick]:
    """The labelled pairs of one prompt from the scores of its
    completions, as the request's method says.
    """
    if request.method == "best_worst":
        order = sorted(range(len(scores)), key=scores.__getitem__)
        best = order[-1]
        worst = order[0]
        return [(best, worst)] if scores[best] > scores[worst] else []

    places = list(range(len(scores)))
    if request.method == "rejection":
        places = rejection_sample(
            scores, beta=request.beta, n=2 * request.pairs, generator=generator
        )

    picks = []
    scale = request.label_temperature
    for first, second in list(zip(places[::2], places[1::2]))[: request.pairs]:
        gap = scores[first] - scores[second]
        if scale == 0 and gap == 0:
            continue
        if scale == 0:
            first_wins = gap > 0
        else:
            # sigmoid(gap / scale), in a form that never overflows
            probability = 0.5 * (1 + math.tanh(gap / (2 * scale)))
            first_wins = float(torch.rand((), generator=generator)) < probability
        picks.append((first, second) if first_wins else (second, first))
    return picks


def rejection_sample(
    scores: Sequence[float], *, beta: float, n: int, generator: Generator
) -> list[int]:
    """Places of at most `n` of the pool's members, accepted with probability exp((score - largest
    score left) / beta) sweep by sweep and then removed.

    From a large pool of samples of p they are samples of p * exp(score / beta); beta towards 0
    takes the best, beta large takes any. Liu et al. 2023, arXiv:2309.06657, algorithm 1.
    """
    left = torch.randperm(len(scores), generator=generator).tolist()
    accepted: list[int] = []
    while left and len(accepted) < n:
        best = max(scores[place] for place in left)
        luck = torch.rand(len(left), generator=generator, dtype=torch.float64).tolist()
        sweep = [
            place
            for place, uniform in zip(left, luck)
            if uniform < math.exp((scores[place] - best) / beta)
        ]
        sweep = sweep[: n - len(accepted)]

        accepted += sweep
        left = [place for place in left if place not in sweep]
    return accepted
