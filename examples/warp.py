"""WARP (Ramé et al. 2024, arXiv:2406.16768): train several runs against moving averages of
themselves, merge them on the sphere, go part of the way back to the start, and repeat from there.

    python examples/warp.py rpg runs/warp                 # the shipped recipe rpg
    python examples/warp.py mine.yaml runs/warp --rounds 3 --runs 4 --share 0.5 train.steps=100

Round k leaves `runs/warp/k/SEED` (ordinary run folders) and `runs/warp/k/merged`. The same command goes
on after an interruption. A run's own `kl` is to its moving average; to see how far the rounds are
from where all began, and what they gained:

    alignkit eval runs/warp/*/merged --reference task:reviews

An objective with an anchor is asked for: its KL is what the moving average weakens. For SALSA (Chegini
et al. 2024, arXiv:2411.01798) merge instead the runs that you have, and train against the soup:

    alignkit merge runs/a runs/b --to soup && alignkit train rpg reference.kind=soup
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alignkit.config.recipe import load_recipe
from alignkit.runs.launch import run_recipe
from alignkit.runs.merge import MergeRequest, merge_models

DECAY = 0.99  # of the moving average that anchors a run


def warp(
    recipe: str,
    to: Path,
    *,
    rounds: int = 2,
    runs: int = 2,
    share: float = 0.3,
    changes: Sequence[str] = (),
) -> list[Path]:
    """Run WARP's rounds, and return the folder of the merged model of each."""
    start = None  # where the present round begins; at first where the recipe does
    merged = []
    for k in range(1, rounds + 1):
        folders = [to / str(k) / str(seed) for seed in range(runs)]
        for seed, folder in enumerate(folders):
            train(recipe, folder, start, seed=k * runs + seed, changes=changes)

        # On the sphere the merged step is as long as the runs' own, where a mean would be shorter;
        # then only a part of it is taken.
        soup = to / str(k) / "merged"
        if not soup.exists():
            merge_models(
                MergeRequest(
                    [str(folder) for folder in folders],
                    soup,
                    "slerp",
                    toward=start,
                    shares=(share,),
                )
            )
        merged.append(soup)
        start = str(soup)
    return merged


def train(
    recipe: str, folder: Path, start: str | None, *, seed: int, changes: Sequence[str]
) -> None:
    """One run from `start` against the moving average of itself; a finished one is kept."""
    settings = [
        "reference.kind=ema",
        f"reference.decay={DECAY}",
        f"train.seed={seed}",
        f"output_dir={folder}",
        *changes,
    ]
    if start is not None:
        settings.append(f"model.name_or_path={start}")
    run_recipe(load_recipe(recipe, settings), "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe, or the name of a shipped one")
    parser.add_argument("to", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2, help="in a round")
    parser.add_argument("--share", type=float, default=0.3, help="of the merged step")
    parser.add_argument("changes", nargs="*", help="a.b=value, for every run")
    asked = parser.parse_intermixed_args()
    merged = warp(
        asked.recipe,
        asked.to,
        rounds=asked.rounds,
        runs=asked.runs,
        share=asked.share,
        changes=asked.changes,
    )
    print("merged:", *merged)


if __name__ == "__main__":
    main()
