"""`alignkit eval --reward-benchmark`: how often a reward model, a preference model or a judge puts
the right answer first, as RewardBench 2 counts it, and a report card of its verdicts on pairs.

Importing this imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from alignkit.config.data import DataConfig
from alignkit.config.decode import is_decode_file
from alignkit.config.escaping import plain
from alignkit.config.judges import JudgeConfig
from alignkit.config.text import read_recipe
from alignkit.config.validation import validated
from alignkit.data.messages import checked_text
from alignkit.data.read import read_rows
from alignkit.data.verdicts import BadRow
from alignkit.errors import ConfigError, DataError
from alignkit.metrics.completions import preference_figures
from alignkit.metrics.intervals import Array
from alignkit.metrics.rewardbench2 import log_odds_scores, rewardbench2
from alignkit.runs.trained_model import find_finished

Results = dict[str, Any]  # JSON
Reward = Callable[[Sequence[Any], Sequence[Any]], Sequence[float | None]]
Compare = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Array, Array]]

FIGURES = {
    "accuracy": "pairs ordered rightly, ties half",
    "calibration_error": "calibration error",
    "brier": "Brier score",
    "position_bias": "position bias",
    "position_inconsistency": "position inconsistency",
    "invalid": "share of invalid verdicts",
}


@dataclass(frozen=True)
class Question:
    """A prompt with its answers, the correct ones first."""

    subset: str
    id: str
    prompt: Any
    answers: list[Any]
    num_correct: int


@dataclass(frozen=True)
class Judged:
    """What a scorer says of one question's answers: its scores, and of each pair of a correct and a
    wrong answer the probability that the correct one wins, and the lean towards the first position.
    """

    scores: list[float]
    probability: Array  # [pairs]
    bias: Array | None  # [pairs]; None for what scores each answer by itself
    invalid: int = 0  # of the verdicts
    verdicts: int = 0


def read_questions(file: str, *, chat: bool = False) -> list[Question]:
    """The rows of a benchmark: `prompt`, `chosen` and `rejected` (lists of answers, or one), with
    `subset` and `id` where there are some. With `chat` a text is what a user says. DataError names
    the first row that is malformed.
    """
    rows = read_rows(DataConfig(), file)
    questions = [_question(row.number, row.values, row.problem) for row in rows.rows]
    if chat:
        questions = [
            replace(question, prompt=[{"role": "user", "content": question.prompt}])
            if isinstance(question.prompt, str)
            else question
            for question in questions
        ]
    if not questions:
        raise DataError(f"{rows.where} has no rows; give a file with prompt, chosen and rejected")
    # Scores of zero: what is wrong with the rows is said before anything is loaded and asked.
    rewardbench2(_rows_of(questions, [[0.0] * len(each.answers) for each in questions]))
    return questions


def _question(number: int, values: Any, problem: str) -> Question:
    if values is None:
        raise DataError(f"row {number} cannot be read: {problem}")
    missing = [key for key in ("prompt", "chosen", "rejected") if values.get(key) is None]
    if missing:
        there = ", ".join(map(str, values)) or "no columns"
        raise DataError(
            f"row {number} has no {', '.join(missing)} among {there}; a row of a benchmark has "
            "prompt, chosen and rejected, the last two lists of answers"
        )

    try:
        prompt = checked_text(values["prompt"], "prompt")
        correct = _answers(values["chosen"], "chosen")
        wrong = _answers(values["rejected"], "rejected")
    except BadRow as error:
        raise DataError(f"row {number}: {error}") from None
    if not correct or not wrong:
        raise DataError(
            f"row {number} has {len(correct)} correct and {len(wrong)} wrong answers; at least one "
            "has to be correct (chosen) and one wrong (rejected)"
        )
    # Parquet fills what a row does not have with null.
    name = number if values.get("id") is None else values["id"]
    subset = "all" if values.get("subset") is None else values["subset"]
    if not isinstance(subset, str) or subset == "total":
        raise DataError(
            f"row {number} has the subset {subset!r}; name it by a text other than `total`, which is "
            "the mean of all subsets"
        )
    return Question(subset, str(name), prompt, [*correct, *wrong], len(correct))


def _answers(given: Any, column: str) -> list[Any]:
    """A list of answers, each a text or messages; a text or a list of messages is one."""
    is_one = not isinstance(given, list) or (given and isinstance(given[0], dict))
    return [checked_text(answer, column) for answer in ([given] if is_one else given)]


def judge_section(name: str) -> JudgeConfig | str:
    """What scores under this name: the `judge` section of a YAML file, or the folder or hub name of
    a model. ConfigError for a file without the section, ModelError for a folder that is missing.
    """
    if not is_decode_file(name):
        folder = find_finished(name)
        return str(folder) if folder.exists() else name
    data, origin = read_recipe(Path(name).expanduser())
    if not isinstance(data.get("judge"), dict):
        raise ConfigError(
            f"{name}: a file in the place of a reward model has a `judge` section, such as "
            "`judge: {function: my_judge.py:better}`"
        )
    return validated(JudgeConfig, data["judge"], origin, ("judge",))


def benchmark(names: Sequence[str], file: str, *, chat: bool = False, safe: bool) -> Results:
    """Every scorer of `names` on the rows of `file`, as JSON.

    A reward model's scores count as they are. A judge compares each two answers of a prompt in both
    orders, and an answer's score is the mean of its log-odds against all of them; a verdict that is
    invalid is a tie, and counted.
    """
    questions = read_questions(file, chat=chat)
    sections = {name: judge_section(name) for name in names}

    from alignkit.judges.base import BradleyTerry
    from alignkit.judges.load import load_judge  # brings torch

    models = []
    for name, section in sections.items():
        config = {"model": section} if isinstance(section, str) else section
        judge: Any = load_judge(config, safe=safe)
        if isinstance(judge, BradleyTerry):
            judged = _by_scores(cast("Reward", judge.reward), questions)
        else:
            judged = [_by_verdicts(_asked(judge), question) for question in questions]
        models.append({"name": name, **_results(questions, judged)})
    return {"benchmark": file, "prompts": len(questions), "models": models}


def _by_scores(reward: Reward, questions: Sequence[Question]) -> list[Judged]:
    """What a reward says, all answers asked for at once; sigmoid of a difference is a probability."""
    prompts = [question.prompt for question in questions for _ in question.answers]
    answers = [answer for question in questions for answer in question.answers]
    every = iter(reward(prompts, answers))

    judged = []
    for question in questions:
        given = [next(every) for _ in question.answers]
        scores = [score for score in given if score is not None]
        if len(scores) < len(given):
            raise DataError(f"row {question.id}: the reward gives an answer no score")
        gaps = np.subtract.outer(scores[: question.num_correct], scores[question.num_correct :])
        judged.append(Judged(scores, 1 / (1 + np.exp(-gaps.ravel())), None))
    return judged


def _asked(judge: Any) -> Compare:
    """P(the first wins) and whether that is a verdict, [B] each, in the order given."""
    from alignkit.judges.base import BothOrders

    once = BothOrders(judge.ask, name=judge.name, symmetrise=False)

    def compare(
        prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> tuple[Array, Array]:
        verdict = once(prompts, first, second)
        return verdict.probability.numpy(), verdict.valid.numpy()

    return compare


def _by_verdicts(compare: Compare, question: Question) -> Judged:
    """What a judge says of each two answers, asked in both orders."""
    count = len(question.answers)
    pairs = list(combinations(range(count), 2))
    orders = [*pairs, *((j, i) for i, j in pairs)]
    first = [question.answers[i] for i, _ in orders]
    second = [question.answers[j] for _, j in orders]
    probability, valid = compare([question.prompt] * len(orders), first, second)

    table = np.full((count, count), 0.5)  # [i, j] P(i wins | i stands first)
    for (i, j), value in zip(orders, probability):
        table[i, j] = value
    wins = (table + 1 - table.T) / 2
    lean = table + table.T - 1
    right, wrong = np.array(list(_correct_and_wrong(question))).T
    return Judged(
        log_odds_scores(wins),
        wins[right, wrong],
        lean[right, wrong],
        len(valid) - int(valid.sum()),
        len(valid),
    )


def _correct_and_wrong(question: Question) -> Iterator[tuple[int, int]]:
    """The places of each correct with each wrong answer."""
    correct = range(question.num_correct)
    return product(correct, range(question.num_correct, len(question.answers)))


def _results(questions: Sequence[Question], judged: Sequence[Judged]) -> Results:
    """Subsets' accuracies and the report card of one scorer."""
    biases = [each.bias for each in judged if each.bias is not None]
    card = preference_figures(
        np.concatenate([each.probability for each in judged]),
        np.concatenate(biases) if biases else None,
    )
    verdicts = sum(each.verdicts for each in judged)
    if verdicts:
        card["invalid"] = sum(each.invalid for each in judged) / verdicts
    scores = rewardbench2(_rows_of(questions, [each.scores for each in judged]))
    return {"scores": scores, "figures": card}


def _rows_of(questions: Sequence[Question], scores: Sequence[list[float]]) -> list[dict[str, Any]]:
    """Rows as `rewardbench2` takes them."""
    return [
        {
            "subset": question.subset,
            "id": question.id,
            "scores": given,
            "num_correct": question.num_correct,
        }
        for question, given in zip(questions, scores)
    ]


def show(results: Results, console: Console) -> None:
    """Print the results of `benchmark`: a row for each subset and figure, a column for each model."""
    models = results["models"]
    table = Table(title=plain(f"{results['prompts']} prompts of {results['benchmark']}"))
    for heading in ("subset", *(Path(model["name"]).name for model in models)):
        table.add_column(plain(heading))

    for subset in models[0]["scores"]:
        table.add_row(plain(subset), *(f"{model['scores'][subset]:.4f}" for model in models))
    table.add_section()
    for name, words in FIGURES.items():
        cells = [model["figures"].get(name) for model in models]
        if any(cell is not None for cell in cells):
            table.add_row(words, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    console.print(table)
