"""Writes decoders.md: train, merge, or sample? Decoders, merges and trained runs on a real model, in one
picture with their prices.

    STORIES=folder python docs/results/make_decoders.py
    STORIES=folder python docs/results/make_decoders.py --prompts 60     # a quicker look

The folder holds `stories260k/` and `stories_sentiment/`. Needs vaderSentiment. After an interruption the
same command continues: everything is kept in runs/reproduce/decoders.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from make_compare import publish

from alignkit.comparison.compare import compare
from alignkit.config.recipe import load_recipe
from alignkit.runs.launch import run_recipe
from alignkit.runs.merge import MergeRequest, merge_models

HERE = Path(__file__).resolve().parent
SCORE = f"{HERE.parents[1] / 'examples' / 'stories.py'}:happiness"
SHARES = (0.25, 0.5, 0.75)  # of the way from the base model to the DPO run
BETA = 0.08  # of the tilt
GRID = {"dpo": {"beta": [0.1, 0.3]}, "ipo": {"tau": [0.03, 0.1, 0.3]}}
# The learned value that particles go by: the law of the score after each token.
VALUE = {"name": "token_value", "bins": 21, "low": -1.0, "high": 1.0}

WORDS = """A trained policy pays in KL, a decoder pays in samples. Trained runs, decoders that need no training, a learned value as
the twist of particles, and DeRa and merges (from the one DPO run at beta 0.1) on the same openings, by the same score."""


def decoders(base: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The decoders beside the grid, all from one DPO run or from none."""
    run = folder / "runs" / "dpo-beta=0.1-seed=0"
    mixed = [{"reference": 1 - share, "policy": share} for share in SHARES]
    return {
        "soft best of n": {
            "model": str(base),
            "method": "soft_best_of",
            "n": [2, 4, 8, 16],
            "beta": BETA,
        },
        "learned twist": {
            "model": str(base),
            "method": "smc",
            "particles": [2, 4],
            "beta": BETA,
            "twist": str(folder / "value"),
            "proposal": "twist",
        },
        "DeRa": {"model": str(run), "method": "fuse", "weights": mixed},
        "merge": {
            "model": [str(folder / "merged" / f"{share:g}") for share in SHARES],
            "method": "sample",
        },
    }


def settings(stories: Path, folder: Path, asked: argparse.Namespace) -> list[str]:
    """What differs from the recipe compare_stories."""
    return [
        f"model.name_or_path={stories / 'stories260k'}",
        f"rewards=[{{function: '{SCORE}'}}]",
        f"output_dir={folder}",
        f"compare.grid={yaml.safe_dump(GRID, default_flow_style=True)}",
        "compare.overrides={}",
        f"compare.max_prompts={asked.prompts}",
        *asked.changes,
    ]


def train_value(base: list[str], stories: Path, folder: Path, steps: int) -> None:
    """The learned value, from samples of the base model."""
    changes = [
        f"data.train={stories / 'stories_sentiment' / 'prompts_train.jsonl'}",
        "data.eval=null",
        f"objective={yaml.safe_dump(VALUE, default_flow_style=True)}",
        f"train.steps={steps}",
        "train.learning_rate=1.0e-3",
        # Few completions of many openings: those of one opening have much of their score in common.
        "train.batch_size=64",
        "rollout.completions=2",
        "compare=null",
        f"output_dir={folder / 'value'}",
    ]
    kept = [change for change in base if not change.startswith(("compare.", "output_dir="))]
    run_recipe(load_recipe("compare_stories", [*kept, *changes]), "auto")


def checks(results: dict[str, Any]) -> list[str]:
    """What the picture is asked, in numbers."""
    tilted = sorted(results["baselines"]["tilted"], key=lambda row: row["kl"]["value"])
    kls = [row["kl"]["value"] for row in tilted]
    scores = [row["score"]["value"] for row in tilted]
    rows = {row["name"]: row for row in results["decoders"]}
    lines = []
    for row in rows.values():
        best = float(np.interp(row["kl"], kls, scores))
        low = "" if row["kl_low"] is None else f"{row['kl_low']:.2f} to "
        lines.append(
            f"{row['label']}, {row['setting']}: score {row['score']:.3f} at {low}{row['kl']:.2f} nats, {best - row['score']:+.3f} "
            f"below the tilted optimum there; {row['reward_calls']:.0f} reward calls, "
            f"{row['sampled']:.0f} tokens"
        )

    # Reward calls that soft best of n needs for the score of the particles, between its points.
    pool = [row for row in rows.values() if row["label"] == "soft best of n"]
    pool.sort(key=lambda row: row["score"])
    for row in rows.values():
        if row["label"] == "learned twist":
            lines.append(
                f"{row['label']}, {row['setting']}: {calls_for(row['score'], pool)} for its score, the "
                f"particles {row['reward_calls']:.1f}"
            )
    return lines


def calls_for(score: float, pool: list[dict[str, Any]]) -> str:
    """The reward calls of soft best of n for a score, between its points."""
    scores = [row["score"] for row in pool]
    if not scores[0] <= score <= scores[-1]:
        beyond, end = ("fewer", pool[0]) if score < scores[0] else ("more", pool[-1])
        return f"soft best of n needs {beyond} than {end['reward_calls']:.0f} reward calls"
    calls = np.interp(score, scores, [row["reward_calls"] for row in pool])
    return f"soft best of n needs {calls:.1f} reward calls"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=250, help="of the test openings")
    parser.add_argument("--value-steps", type=int, default=1250)
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce/decoders"))
    parser.add_argument("changes", nargs="*", help="a.b=value, for all runs")
    asked = parser.parse_intermixed_args()
    if "STORIES" not in os.environ:  # as the other scripts of `make reproduce`
        print("skipped; set STORIES to the folder that holds stories260k and stories_sentiment")
        return
    stories = Path(os.environ["STORIES"])
    folder = asked.folder

    # The grid first: DeRa and the merges are made of one of its runs.
    base = settings(stories, folder, asked)
    compare(load_recipe("compare_stories", base))
    train_value(base, stories, folder, asked.value_steps)
    run = str(folder / "runs" / "dpo-beta=0.1-seed=0")
    start = str(stories / "stories260k")
    if not (folder / "merged").exists():
        merge_models(MergeRequest([run], folder / "merged", toward=start, shares=SHARES))

    section = yaml.safe_dump(decoders(stories / "stories260k", folder), default_flow_style=True)
    results = compare(load_recipe("compare_stories", [*base, f"compare.decode={section}"]))
    lines = checks(results)
    print(*lines, sep="\n")
    words = [WORDS, "", "```", *lines, "```", ""]
    publish("decoders", folder, "\n".join(words), "make_decoders.py")


if __name__ == "__main__":
    main()
