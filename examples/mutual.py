"""A translator and a tester train each other (MSL, Ke et al. 2025, arXiv:2506.11153): translations that
the tester's tests let pass teach the translator, tests that catch a translation teach the tester.

    python examples/mutual.py programs.jsonl world.py:agrees runs/mutual --translator MODEL --tester MODEL

`programs.jsonl` has rows with `prompt`, what both models read. `agrees(prompt, translation, test)` is
your own: it runs both programs on the test and says whether they do the same; None where the text is
no test of the program. Round k leaves `runs/mutual/k/translator` and `runs/mutual/k/tester`, ordinary
run folders of `sft`, each from the model of the round before, and the rows that they learned. The same
command goes on after an interruption.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from alignkit.config.plugins import load_object
from alignkit.config.recipe import load_recipe
from alignkit.files import read_jsonl, write_jsonl
from alignkit.rollout.text import decode_after
from alignkit.runs.launch import run_recipe
from alignkit.runs.pairs import PairRequest
from alignkit.runs.sampled_answers import sample_answers

Agrees = Callable[[str, str, str], bool | None]
ROLES = ("translator", "tester")


def verified(
    prompt: str, translations: Sequence[str], tests: Sequence[str], agrees: Agrees
) -> tuple[list[str], list[str]]:
    """The translations that pass every test there is, where there is one, and the tests that some
    translation fails.
    """
    verdicts = [[agrees(prompt, text, test) for test in tests] for text in translations]
    passed = [text for text, row in zip(translations, verdicts) if {*row} - {None} == {True}]
    caught = [test for test, row in zip(tests, zip(*verdicts)) if False in row]
    return passed, caught


def mutual(
    programs: Path,
    agrees: Agrees,
    to: Path,
    models: dict[str, str],
    *,
    rounds: int = 2,
    samples: int = 4,
    changes: Sequence[str] = (),
) -> dict[str, str]:
    """Run the rounds; the models, by role, that the last one ends with."""
    for k in range(1, rounds + 1):
        files = {role: to / str(k) / f"{role}.jsonl" for role in ROLES}
        if not all(file.exists() for file in files.values()):
            answers = {role: answers_of(models[role], programs, samples, k) for role in ROLES}
            make_rows(answers, agrees, files)

        for role, file in files.items():
            if not read_jsonl(file):
                continue  # nothing to learn from this time
            folder = file.with_suffix("")
            settings = [
                f"model.name_or_path={models[role]}",
                f"data={{train: {file}, eval: null}}",
                f"train.seed={k}",
                f"output_dir={folder}",
            ]
            run_recipe(load_recipe("sft", [*settings, *changes]), "auto")
            models = {**models, role: str(folder / "model")}
    return models


def make_rows(
    answers: dict[str, dict[str, list[str]]], agrees: Agrees, files: dict[str, Path]
) -> None:
    """Write what each role is to learn in a round, from both roles' answers to each program."""
    rows: dict[str, list[dict[str, str]]] = {role: [] for role in ROLES}
    for prompt, translations in answers["translator"].items():
        learnt = verified(prompt, translations, answers["tester"][prompt], agrees)
        for role, texts in zip(ROLES, learnt):
            rows[role] += [{"prompt": prompt, "completion": text} for text in texts]

    for role, file in files.items():
        print(f"{file}: {len(rows[role])} rows")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows[role])


def answers_of(model: str, programs: Path, samples: int, seed: int) -> dict[str, list[str]]:
    """The answers of a model to each program, without empty ones."""
    drawn = sample_answers(PairRequest(model, str(programs), samples=samples, seed=seed))
    answers = {}
    for prompt, row in zip(drawn.prompts, drawn.samples):
        texts = [decode_after(drawn.tokenizer, prompt.ids, sample.ids) for sample in row]
        answers[prompt.text] = [text for text in texts if text.strip()]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path)
    parser.add_argument("agrees", help="FILE.py:NAME")
    parser.add_argument("to", type=Path)
    parser.add_argument("--translator", required=True)
    parser.add_argument("--tester", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="of each role to each program")
    parser.add_argument("changes", nargs="*", help="a.b=value, for every run")
    asked = parser.parse_intermixed_args()
    agrees = load_object(asked.agrees, what="agrees")
    models = {"translator": asked.translator, "tester": asked.tester}
    sizes = {"rounds": asked.rounds, "samples": asked.samples}
    models = mutual(asked.programs, agrees, asked.to, models, **sizes, changes=asked.changes)
    print("models:", *models.values())


if __name__ == "__main__":
    main()
