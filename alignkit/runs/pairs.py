"""Preference pairs from any model and reward: sample, score, label, write. Iterative DPO is this
and `train` in turn.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.data.load import Prompt, load_prompts
from alignkit.errors import ConfigError, DataError, ResourceError
from alignkit.rewards.call import Score, call_reward
from alignkit.rewards.load import load_rewards
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.text import as_reply, decode, decode_after
from alignkit.runs.trained_model import load_finished
from alignkit.tasks import Task, resolve
from alignkit.training.checkpoint import fsync

Method = Literal["bradley_terry", "best_worst", "rejection"]
Pick = tuple[int, int]  # the better completion's place among a prompt's, and the worse one's


@dataclass(frozen=True)
class PairRequest:
    """What to make: `samples` completions of each prompt, from them up to `pairs` labelled pairs.

    bradley_terry: pairs in the order drawn, the first wins with probability sigmoid(difference /
    label_temperature), 0: the higher score does. best_worst: highest against lowest score, one
    pair. rejection: the completions are first thinned to samples of model * exp(score / beta)
    (RSO), then paired and labelled as in bradley_terry.
    """

    model: str
    prompts: str  # a file, a data set, or task:NAME
    reward: str | None = None  # FILE.py:NAME, module:NAME, a reward model; None: the task's own
    method: Method = "bradley_terry"
    samples: int = 4
    pairs: int = 1
    label_temperature: float = 1.0
    beta: float = 0.5
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    safe: bool = False

    def __post_init__(self) -> None:
        if (
            self.samples < 2
            or self.pairs < 1
            or not self.beta > 0
            or not self.label_temperature >= 0
        ):
            raise ConfigError(
                f"pairs: samples {self.samples} (at least 2), pairs {self.pairs} (at least 1), beta {self.beta} (above 0), "
                f"label_temperature {self.label_temperature} (at least 0): one of them is out of its range"
            )


def rejection_sample(
    scores: Sequence[float], *, beta: float, n: int, generator: Generator
) -> list[int]:
    """Places of at most `n` of the pool's members, accepted with probability exp((score - largest
    score left) / beta) sweep by sweep and then removed. From a large pool of samples of p they are
    samples of p * exp(score / beta); beta towards 0 takes the best, beta large takes any. Liu et
    al. 2023, arXiv:2309.06657, algorithm 1.
    """
    left = torch.randperm(len(scores), generator=generator).tolist()
    kept = list[int]()
    while left and len(kept) < n:
        top = max(scores[i] for i in left)
        luck = torch.rand(len(left), generator=generator, dtype=torch.float64).tolist()
        accepted = [i for i, u in zip(left, luck) if u < math.exp((scores[i] - top) / beta)][
            : n - len(kept)
        ]
        kept += accepted
        left = [i for i in left if i not in accepted]
    return kept


def label(scores: Sequence[float], request: PairRequest, generator: Generator) -> list[Pick]:
    """The labelled pairs of one prompt from the scores of its completions, as the request's method
    says.
    """
    if request.method == "best_worst":
        order = sorted(range(len(scores)), key=scores.__getitem__)
        return [(order[-1], order[0])] if scores[order[-1]] > scores[order[0]] else []
    places = list(range(len(scores)))
    if request.method == "rejection":
        places = rejection_sample(
            scores, beta=request.beta, n=2 * request.pairs, generator=generator
        )
    picks = []
    for first, second in list(zip(places[::2], places[1::2]))[: request.pairs]:
        gap = scores[first] - scores[second]
        scale = request.label_temperature
        if scale == 0 and gap == 0:
            continue
        wins = (
            gap > 0
            if scale == 0
            else float(torch.rand((), generator=generator))
            < 0.5 * (1 + math.tanh(gap / (2 * scale)))
        )
        picks.append((first, second) if wins else (second, first))
    return picks


def make_pairs(request: PairRequest, to: Path) -> Counter[str]:
    """Write the pairs to `to` (JSON lines: prompt, chosen, rejected, chosen_score, rejected_score)
    and return what was counted.

    The file appears whole or not at all. ConfigError where it exists or there is no reward,
    DataError where no pair is left.
    """
    if to.exists():
        raise ConfigError(f"{to} exists already; name another file")
    task = resolve(request.prompts) if request.prompts.startswith("task:") else None
    models = load_finished(request.model)
    prompts, report = load_prompts(
        DataConfig(), models.tokenizer, source=task.rows("rollout") if task else request.prompts
    )
    sampler = HFSampler(
        models,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        seed=request.seed,
    )
    drawn = sampler.sample(
        [p.ids for p in prompts], Draw(request.samples), step=0, prompt_ids=range(len(prompts))
    )
    texts = [
        [_text(models.tokenizer, prompt, s.ids) for s in samples]
        for prompt, samples in zip(prompts, drawn)
    ]
    counts = Counter({"prompts": len(prompts), "prompts dropped": report.total - len(prompts)})
    counts["completions"] = sum(map(len, texts))
    counts["cut at max_new_tokens"] = sum(not s.ended for samples in drawn for s in samples)
    ids = [[s.ids.tolist() for s in samples] for samples in drawn]
    scores = _scores(request, task, prompts, texts, ids)
    rows = _rows(request, prompts, texts, scores, counts)
    if not rows:
        told = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise DataError(
            f"pairs: no pair is left ({told}); draw more samples, raise the temperature, or check the reward"
        )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        beside = to.with_name(f".{to.name}.tmp")
        beside.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        fsync(beside)
        beside.replace(to)
    except OSError as error:
        raise ResourceError(
            f"pairs: {to} could not be written: {error.strerror or error}"
        ) from error
    return counts


def _text(tokenizer: Any, prompt: Prompt, ids: torch.Tensor) -> str:
    """A completion as it is written to the file, where a plain prompt is followed by it directly."""
    if isinstance(prompt.text, str):
        return decode_after(tokenizer, prompt.ids, ids)
    return decode(tokenizer, ids)


def _scores(
    request: PairRequest,
    task: Task | None,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    ids: Sequence[Sequence[list[int]]],
) -> list[list[Score]]:
    """One score, or None, for each completion of each prompt."""
    if request.reward is not None:
        section = {"function" if ":" in request.reward else "model": request.reward}
        reward: Any = load_rewards(
            [section], safe=request.safe, device="cuda" if torch.cuda.is_available() else "cpu"
        )
    elif task is not None:
        reward = task.reward
    else:
        raise ConfigError(
            "pairs: no reward; name one with --reward FILE.py:NAME or a reward model's folder"
        )
    replies = [[as_reply(p.text, text) for text in row] for p, row in zip(prompts, texts)]
    return call_reward(reward, prompts, replies, ids)


def _rows(
    request: PairRequest,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Any],
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """The pairs as rows; what leaves on the way is counted."""
    generator = Generator().manual_seed(request.seed)
    rows: list[dict[str, Any]] = []
    for prompt, row, graded in zip(prompts, texts, scores):
        usable = [
            i
            for i, (text, score) in enumerate(zip(row, graded))
            if score is not None and text.strip()
        ]
        counts["empty or without a score"] += len(row) - len(usable)
        picks = label([graded[i] for i in usable], request, generator) if len(usable) > 1 else []
        counts["prompts without a pair"] += not picks
        for better, worse in ((usable[a], usable[b]) for a, b in picks):
            if row[better] == row[worse]:
                counts["pairs of equal texts left out"] += 1
                continue
            made = {"prompt": prompt.text, "chosen": row[better], "rejected": row[worse]}
            rows.append({**made, "chosen_score": graded[better], "rejected_score": graded[worse]})
    counts["pairs written"] = len(rows)
    return rows
