"""Makes the files of a task: its base model and its rows. `python -m alignkit.tasks.build NAME
FOLDER [TASK_FOLDER]` is what `alignkit.tasks.worker` starts; with a TASK_FOLDER it makes the
teacher of the task whose files are there.
"""

import sys
from pathlib import Path

from alignkit import files
from alignkit.policies.pair import PolicyPair
from alignkit.rollout.generate import generate
from alignkit.tasks import TASKS
from alignkit.tasks.arithmetic import CHARACTERS, Arithmetic, answer
from alignkit.tasks.base_model import (
    character_tokenizer,
    train_base,
    train_further,
    word_tokenizer,
)
from alignkit.tasks.cyclic import Cyclic
from alignkit.tasks.dataset import write_rows
from alignkit.tasks.definition import BaseConfig
from alignkit.tasks.reviews import Reviews
from alignkit.tasks.shop import Shop

WATCHED_PROMPTS = 400  # on which the base model of sums is watched
TEACHER = BaseConfig(steps=200, batch_size=32, learning_rate=3e-3)  # its size is the base model's


def build(name: str, folder: Path) -> None:
    """Train the base model of the task `name` and write its rows: `folder`/model, `folder`/rows."""
    definition = TASKS[name]
    if isinstance(definition, Cyclic):
        definition = definition.base  # the game shares the files of the reviews

    if isinstance(definition, Reviews):
        build_reviews(definition, folder)
    elif isinstance(definition, Arithmetic):
        build_arithmetic(definition, folder)
    elif isinstance(definition, Shop):
        build_shop(definition, folder)
    else:
        raise TypeError(f"build.py does not know how to make the task {name}")


def build_reviews(reviews: Reviews, folder: Path) -> None:
    """A base model of the critics' corpus, and the rows that it samples."""
    corpus = list(reviews.corpus_rows(reviews.corpus))
    tokenizer = word_tokenizer(reviews.vocabulary)
    model = train_base(reviews.base, tokenizer, corpus, folder)
    write_rows(reviews, model, folder / "rows")


def build_arithmetic(sums: Arithmetic, folder: Path) -> None:
    """A base model that has half understood addition, and the sums of every split."""
    solved = {
        split: [{"prompt": prompt, "completion": answer(prompt) or ""} for prompt in prompts]
        for split, prompts in sums.splits.items()
    }
    watched = sums.splits["train"][:WATCHED_PROMPTS]

    def half_understood(pair: PolicyPair) -> bool:
        """Whether a third of the sampled answers to some training prompts is right."""
        answers = generate(pair, watched, max_new_tokens=sums.cap)
        scores = sums.reward(watched, [texts[0] for texts in answers])
        return sum(scores) >= len(watched) / 3

    tokenizer = character_tokenizer(CHARACTERS)
    train_base(sums.base, tokenizer, solved["train"], folder, half_understood)

    rows_folder = folder / "rows"
    rows_folder.mkdir()
    for split, rows in solved.items():
        prompts = [{"prompt": row["prompt"]} for row in rows]
        files.write_jsonl(rows_folder / f"demonstrations_{split}.jsonl", rows)
        files.write_jsonl(rows_folder / f"prompts_{split}.jsonl", prompts)


def build_shop(shop: Shop, folder: Path) -> None:
    """A base model of what customers say, and every wish as a prompt."""
    tokenizer = word_tokenizer(shop.vocabulary)
    turns = list(shop.turns(tokenizer.eos_token))
    train_base(shop.base, tokenizer, turns, folder)

    rows_folder = folder / "rows"
    rows_folder.mkdir()
    for split in ("train", "eval"):
        prompts = [{"prompt": prompt} for prompt in shop.prompts]
        files.write_jsonl(rows_folder / f"prompts_{split}.jsonl", prompts)


def build_teacher(folder: Path, task_folder: Path) -> None:
    """Train a task's base model further, on the demonstrations: `folder`/model."""
    rows = files.read_jsonl(task_folder / "rows" / "demonstrations_train.jsonl")
    train_further(TEACHER, rows, task_folder / "model", folder)


if __name__ == "__main__":
    task, target, *task_folder = sys.argv[1:]
    if task_folder:
        build_teacher(Path(target), Path(task_folder[0]))
    else:
        build(task, Path(target))
