"""Writes iterative.md: three rounds of `alignkit pairs` and DPO on a real model, beside DPO on
pairs that were made beforehand.

About 25 minutes on one core:

    STORIES=folder python docs/results/make_iterative.py

Train one of them; the other rows stay as they are:

    STORIES=folder python docs/results/make_iterative.py --only iterative

The folder holds `stories260k/` and `stories_sentiment/`. Needs vaderSentiment.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from alignkit.config.data import DataConfig
from alignkit.config.plugins import load_object
from alignkit.config.recipe import load_recipe
from alignkit.data.load import load_prompts
from alignkit.evaluation.measure import Yardstick, evaluation_pair
from alignkit.metrics.comparisons import compare_frontiers
from alignkit.metrics.frontier import Curve, mean_gain, spanned_range
from alignkit.metrics.intervals import mean_interval
from alignkit.runs.launch import run_recipe
from alignkit.runs.pairs import PairRequest, make_pairs

HERE = Path(__file__).resolve().parent
SCORE = f"{HERE.parents[1] / 'examples' / 'stories.py'}:happiness"
ROUNDS = 3
SEEDS = (0,)
# completions per opening, when pairs are made and when a model is measured; and their length
SAMPLES = 8
TOKENS = 48
VALIDATION = 150  # the last training openings: no pair is made on them
NEAR = 5.4  # nats: a second place at which frontiers are compared
BETAS = {"offline": (0.03, 0.1, 0.3), "at once": (0.2, 0.5, 1.0), "iterative": (0.5, 1.0, 2.0)}


def lines(file: Path) -> int:
    """Rows of a JSON lines file."""
    return len(file.read_text().splitlines())


class Experiment:
    """Trains and measures; everything it writes is in `folder`."""

    def __init__(self, stories: Path, folder: Path, *, validation: bool):
        self.base = stories / "stories260k"
        self.data = stories / "stories_sentiment"
        self.folder = folder
        openings = (self.data / "prompts_train.jsonl").read_text().splitlines(keepends=True)
        self.openings = folder / "openings.jsonl"
        self.openings.write_text("".join(openings[:-VALIDATION]))
        file = folder / "held_out.jsonl"
        file.write_text(
            "".join(openings[-VALIDATION:])
            if validation
            else (self.data / "prompts_test.jsonl").read_text()
        )
        prompts = load_prompts(
            DataConfig(), evaluation_pair(self.base, self.base).tokenizer, source=file
        )[0]
        self.yardstick = Yardstick(
            prompts, SAMPLES, TOKENS, reward=load_object(SCORE, what="score")
        )

    def pairs(self, model: Path, to: Path, seed: int) -> Path:
        """`alignkit pairs MODEL openings.jsonl --reward examples/stories.py:happiness --method
        best_worst --samples 8 ...`
        """
        make_pairs(
            PairRequest(
                str(model),
                str(self.openings),
                SCORE,
                "best_worst",
                SAMPLES,
                max_new_tokens=TOKENS,
                seed=seed,
            ),
            to,
        )
        return to

    def dpo(self, model: Path, data: Path, to: Path, beta: float, seed: int) -> Path:
        """One pass of DPO over the pairs, from `model`, with the base model as the reference.
        Returns the model's folder.
        """
        paths = [
            f"model.name_or_path={model}",
            f"reference.kind={self.base}",
            f"data.train={data}",
            f"output_dir={to}",
        ]
        settings = [
            f"objective.beta={beta}",
            f"train.seed={seed}",
            f"train.steps={lines(data) // 16}",
            "train.batch_size=16",
        ]
        quiet = [
            "train.save_every=0",
            "train.eval_every=0",
            "train.log_samples_every=0",
            "model.layout=padded",
        ]
        run_recipe(
            load_recipe(
                "dpo",
                [*paths, *settings, *quiet, "train.learning_rate=1.0e-4", "train.warmup_steps=10"],
            )
        )
        return to / "model"

    def train(self, label: str, beta: float, seed: int) -> tuple[Path, int]:
        """The model that a way of making pairs ends with, and how many pairs it has seen."""
        at = Path(tempfile.mkdtemp(dir=self.folder))
        if label == "offline":
            data = self.data / "preferences_train.jsonl"
            return self.dpo(self.base, data, at / "run", beta, seed), lines(data)
        if label == "at once":
            # the same for every beta
            made = [self.folder / f"pairs-{seed}-{number}.jsonl" for number in range(ROUNDS)]
            for number, file in enumerate(made):
                if not file.exists():
                    self.pairs(self.base, file, seed=100 * seed + number)
            data = at / "pairs.jsonl"
            data.write_text("".join(file.read_text() for file in made))
            return self.dpo(self.base, data, at / "run", beta, seed), lines(data)
        model = self.base
        seen = 0
        for number in range(ROUNDS):
            data = self.pairs(model, at / f"pairs-{number}.jsonl", seed=100 * seed + number)
            model = self.dpo(model, data, at / f"round-{number}", beta, seed)
            seen = seen + lines(data)
        return model, seen

    def measure(self, model: Path) -> dict[str, list[float]]:
        """Score and KL(model || base) of every held-out opening, means over its samples."""
        found = self.yardstick.measure(evaluation_pair(model, self.base), model.name).per_prompt()
        return {name: np.round(found[name], 5).tolist() for name in ("score", "kl")}


TEXT = """# Iterative DPO on a real model

Regenerated by `make reproduce` (`docs/results/make_iterative.py`) when `STORIES` names the folder of the tutorial's example.

`stories260k` (260K parameters) learns to write happier stories, scored by VADER; what is asked is which pairs DPO should have.

- offline: the {offline} pairs of the data set, two samples of the base model each.
- at once: {at_once} pairs by `alignkit pairs` from the base model, {rounds} of each opening: the happiest of {samples} samples
  against the saddest.
- iterative: as many in {rounds} rounds, the pairs of each round from the model that the round before ended with. The reference of
  every round is the base model, so that beta means the same in all of them.

One pass over the pairs in batches of 16, learning rate 1e-4, from the present model; seeds {seeds}. {openings} test openings
that no training saw, {samples} samples of {tokens} tokens each, temperature 1; KL(model || base) per completion is the exact one
of each token's distribution, summed along the samples. Intervals are 95 %, from a bootstrap over openings (and seeds, where
there are several).

| pairs | beta | KL, nats | VADER score | training, CPU seconds |
|---|---|---|---|---|
{rows}

Frontiers at the largest KL that both reach, paired by opening, 95 % for the three comparisons together (Holm). Between two runs
the gain is interpolated in sqrt(KL) (Gao et al. 2022, arXiv:2210.10760); outside the KLs that the runs of both span there is no
verdict:

{verdicts}

And at {near} nats, where the iterative frontier has a point:

{near_verdicts}

Mean gain over the base model along the frontier, from {low:.1f} to {high:.1f} nats, which the runs of all three span:

{areas}

So iterating is above the data set's pairs at either KL, but most of that is the choice of the pairs: those made at once from the
base model do better near it. Fresh pairs pay far from it, where samples of the base model say little about the policy. One seed:
the intervals say nothing of the luck of a training.

How the pairs are made (the best against the worst of {samples}, labels without noise, the base model as the reference) and the
betas were chosen on the last {validation} training openings, on which no pair was made. At beta 0.1, which is right for the
data set's pairs, three such rounds went to a KL of 45 nats there: labels without noise let DPO go on for ever.
"""


def report(measured: dict) -> str:
    """The page from what was measured."""
    base = np.array(measured["base"]["score"])
    start = mean_interval(base)
    rows = [f"| base model | | 0 | {start.value:.3f} [{start.low:.3f}, {start.high:.3f}] | |"]
    curves = []
    for label, betas in BETAS.items():
        kl = []
        score = []
        for beta in betas:
            runs = [measured["runs"][f"{label} beta={beta} seed={seed}"] for seed in SEEDS]
            kl.append([run["kl"] for run in runs])
            score.append([run["score"] for run in runs])

            # One row of the table: KL and score with their intervals, and the time.
            cells = [
                f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
                for mean in (mean_interval(kl[-1]), mean_interval(score[-1]))
            ]
            seconds = np.mean([run["seconds"] for run in runs])
            rows.append(f"| {label} | {beta} | {' | '.join(cells)} | {seconds:.0f} |")
        settings = tuple(f"beta={beta}" for beta in betas)
        curves.append(Curve(label, settings, np.array(kl), np.array(score)))

    low, high = spanned_range(curves)
    gains = {curve.name: mean_gain(curve, base, low, high) for curve in curves}
    return TEXT.format(
        rows="\n".join(rows),
        verdicts="\n".join(
            f"- {comparison.verdict}" for comparison in compare_frontiers(curves, base)
        ),
        near=NEAR,
        near_verdicts="\n".join(
            f"- {comparison.verdict}" for comparison in compare_frontiers(curves, base, at=NEAR)
        ),
        areas="\n".join(
            f"- {name}: {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
            for name, gain in gains.items()
        ),
        low=low,
        high=high,
        offline=measured["pairs"]["offline"],
        at_once=measured["pairs"]["at once"],
        seeds=", ".join(map(str, SEEDS)),
        openings=len(base),
        rounds=ROUNDS,
        samples=SAMPLES,
        tokens=TOKENS,
        validation=VALIDATION,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", choices=BETAS, default=list(BETAS), help="what to train"
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="measure on the validation openings, print and write nothing",
    )
    asked = parser.parse_args()
    if "STORIES" not in os.environ:
        parser.exit(0, "skipped: set STORIES to the folder of the stories model and its openings\n")
    saved = HERE / "iterative.json"
    found = (
        json.loads(saved.read_text())
        if saved.exists() and not asked.validation
        else {"runs": {}, "pairs": {}}
    )
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(
            Path(os.environ["STORIES"]), Path(folder), validation=asked.validation
        )
        if asked.only:
            found["base"] = experiment.measure(experiment.base)
        for label, beta, seed in [
            (name, beta, seed) for name in asked.only for seed in SEEDS for beta in BETAS[name]
        ]:
            began = time.process_time()
            model, pairs = experiment.train(label, beta, seed)
            seconds = time.process_time() - began
            run = experiment.measure(model) | {"seconds": seconds}
            print(
                label,
                beta,
                seed,
                {name: round(float(np.mean(run[name])), 4) for name in ("score", "kl", "seconds")},
                flush=True,
            )
            found["runs"][f"{label} beta={beta} seed={seed}"] = run
            found["pairs"][label] = pairs
            if not asked.validation:
                saved.write_text(json.dumps(found) + "\n")
    if asked.validation:
        return
    missing = {
        f"{label} beta={beta} seed={seed}"
        for label in BETAS
        for seed in SEEDS
        for beta in BETAS[label]
    } - set(found["runs"])
    if missing:
        parser.exit(0, f"not yet trained: {', '.join(sorted(missing))}\n")
    (HERE / "iterative.md").write_text(report(found))
    print(f"written to {HERE / 'iterative.md'}")


if __name__ == "__main__":
    main()
