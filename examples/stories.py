"""How much happier are the stories, and at what distance from the base model? VADER score and exact KL on held-out openings.

    python examples/stories.py $STORIES runs/happy-0 runs/happy-1 runs/happy-2        # needs vaderSentiment

`$STORIES` holds `stories260k/` and `stories_sentiment/prompts_{train,test}.jsonl`. Four samples of 48 tokens for each opening,
temperature 1, whole distribution. KL(policy || base) per completion: the exact KL of each token's distribution, summed along
the sample (Rao-Blackwellised: unbiased, less noisy than log-ratios).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from alignkit.batches import Bundle, Draw, Plan
from alignkit.data.config import DataConfig
from alignkit.data.load import load_prompts
from alignkit.objectives.sampled import exact_kl
from alignkit.policies.config import ModelConfig, ReferenceConfig
from alignkit.policies.load import load_pair
from alignkit.rollout.hf import HFSampler

SAMPLES, TOKENS = 4, 48
SCORER = SentimentIntensityAnalyzer()


def happiness(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER compound of prompt + completion, in [-1, 1]: what `configs/rpg_stories.yaml` learns from."""
    return [SCORER.polarity_scores(prompt + completion)["compound"] for prompt, completion in zip(prompts, completions)]


def evaluate(base: Path, model: Path, prompts: Path, last: int = 0) -> tuple[float, float]:
    """Mean VADER compound of prompt + completion, and mean KL(model || base) in nats per completion."""
    plan = Plan("sequence", statistics={"kl": exact_kl})
    settings = ModelConfig(name_or_path=str(model))
    pair = load_pair(settings, ReferenceConfig(kind=str(base)), None, plan, device="cpu", fixed_data=False)
    openings = load_prompts(DataConfig(train=str(prompts)), pair.tokenizer)[0][-last:]
    sampler = HFSampler(pair, max_new_tokens=TOKENS, temperature=1.0, top_p=1.0, seed=0)
    drawn = sampler.sample([p.ids for p in openings], Draw(SAMPLES), step=0, prompt_ids=range(len(openings)))
    scores, divergences = [], []
    for opening, samples in zip(openings, drawn):
        bundle = Bundle(opening.ids, [s.ids for s in samples], [torch.ones_like(s.ids, dtype=torch.bool) for s in samples])
        with torch.no_grad():
            divergences += pair.logps([bundle], plan).sequence("kl").tolist()
        scores += happiness([opening.text] * SAMPLES, [pair.tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples])
    return sum(scores) / len(scores), sum(divergences) / len(divergences)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stories", type=Path)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of alignkit train")
    parser.add_argument("--split", default="test", choices=["test", "train"], help="train: its last 150, for choosing settings")
    parser.add_argument("--openings", type=int, help="only the last so many")
    asked = parser.parse_args()
    base, prompts = asked.stories / "stories260k", asked.stories / "stories_sentiment" / f"prompts_{asked.split}.jsonl"
    last = asked.openings or (150 if asked.split == "train" else 0)
    print("| model | VADER score | KL to the base, nats per completion |\n|---|---|---|")
    found = []
    for name, model in [("base", base), *((run.name, run / "model") for run in asked.runs)]:
        score, divergence = evaluate(base, model, prompts, last)
        found.append({"score": score, "kl": divergence})
        print(f"| {name} | {score:.3f} | {divergence:.2f} |", flush=True)
    if len(found) > 2:
        score, divergence = (median(f[key] for f in found[1:]) for key in ("score", "kl"))
        print(f"| median of {len(found) - 1} | {score:.3f} | {divergence:.2f} |")


if __name__ == "__main__":
    main()
