"""How much happier are the stories, and at what distance from the base model? VADER score and exact
KL on held-out openings.

    python examples/stories.py $STORIES runs/happy-0 runs/happy-1 runs/happy-2

Needs vaderSentiment. `$STORIES` holds `stories260k/` and `stories_sentiment/prompts_{train,test}.jsonl`. Four samples of
48 tokens for each opening, temperature 1, whole distribution. KL(policy || base) per completion:
the exact KL of each token's distribution, summed along the sample (Rao-Blackwellised: unbiased,
less noisy than log-ratios). With intervals and more figures, for any model and score:

    alignkit eval runs/happy-0 --prompts prompts_test.jsonl \\
        --reward examples/stories.py:happiness --samples 4 --max-new-tokens 48
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from alignkit.config.data import DataConfig
from alignkit.data.load import load_prompts
from alignkit.evaluation.measure import Yardstick, evaluation_pair

SAMPLES = 4
TOKENS = 48
SCORER = SentimentIntensityAnalyzer()


def happiness(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER compound of prompt + completion, in [-1, 1]: what `configs/rpg_stories.yaml` learns
    from.
    """
    return [
        SCORER.polarity_scores(prompt + completion)["compound"]
        for prompt, completion in zip(prompts, completions)
    ]


def evaluate(base: Path, model: Path, prompts: Path, last: int = 0) -> tuple[float, float]:
    """Mean VADER compound of prompt + completion, and mean KL(model || base) in nats per
    completion.
    """
    pair = evaluation_pair(model, base)
    openings = load_prompts(DataConfig(), pair.tokenizer, source=prompts)[0][-last:]
    yardstick = Yardstick(openings, SAMPLES, TOKENS, reward=happiness)
    measured = yardstick.measure(pair, model.name)
    return measured.score.mean(), measured.kl.mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stories", type=Path)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of alignkit train")
    parser.add_argument(
        "--split",
        default="test",
        choices=["test", "train"],
        help="train: its last 150, for choosing settings",
    )
    parser.add_argument("--openings", type=int, help="only the last so many")
    asked = parser.parse_args()

    base = asked.stories / "stories260k"
    prompts = asked.stories / "stories_sentiment" / f"prompts_{asked.split}.jsonl"
    last = asked.openings or (150 if asked.split == "train" else 0)

    # The base model first: its KL to itself is 0, its score is where the runs start.
    print("| model | VADER score | KL to the base, nats per completion |\n|---|---|---|")
    score, kl = evaluate(base, base, prompts, last)
    print(f"| base | {score:.3f} | {kl:.2f} |", flush=True)

    scores = []
    kls = []
    for run in asked.runs:
        score, kl = evaluate(base, run / "model", prompts, last)
        scores.append(score)
        kls.append(kl)
        print(f"| {run.name} | {score:.3f} | {kl:.2f} |", flush=True)
    if len(scores) > 1:
        print(f"| median of {len(scores)} | {median(scores):.3f} | {median(kls):.2f} |")


if __name__ == "__main__":
    main()
