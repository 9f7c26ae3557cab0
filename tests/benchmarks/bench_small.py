"""An online step of a small model, by part: random Llama of 0.8 M parameters, 16 symbols, RPG.

    python tests/benchmarks/bench_small.py [--prompts 128] [--completions 4] [--new 24] [--steps 6]
    [section.field=value ...]

The reward is the share of a sequence of digits that is continued rightly. What is left of a step
beside its parts is the loop's own: metrics, the log, the average of the weights. The table goes to
stdout as Markdown. To compare two versions, run each with the other's folder in PYTHONPATH. On a
machine that others use, set GOMP_SPINCOUNT=1000, as the `alignkit` command does for itself.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from alignkit import load_recipe, run_recipe
from alignkit.rollout.hf import HFSampler
from alignkit.sources.rollouts import RolloutSource
from alignkit.sources.scoring import Scoring
from alignkit.training.reduction import Reducer

SYMBOLS = ["<pad>", "<s>", "</s>", *"0123456789", *"+-="]
REWARD = """
def continued(prompts, completions, **_):
    return [share(int(prompt[-1]), answer) for prompt, answer in zip(prompts, completions)]

def share(last, answer):
    right = [str((last + i) % 10) for i in range(1, 24)]
    return sum(a == b for a, b in zip(answer, right)) / len(right)
"""
# part of a step -> the method that does it
PARTS = {
    "sample": (HFSampler, "sample"),
    "score": (Scoring, "score"),
    "collect, the rest": (RolloutSource, "collect"),
    "loss and gradient": (Reducer, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(write_digits(Path(folder), asked.prompts), asked)


def write_digits(folder: Path, prompts: int) -> Path:
    """A model of random weights, its tokenizer of single symbols, prompts and a reward."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=len(SYMBOLS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SYMBOLS)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")

    starts = [[(i + j) % 10 for j in range(3 + i % 4)] for i in range(prompts)]
    rows = [{"prompt": "".join(map(str, digits))} for digits in starts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def report(folder: Path, asked: argparse.Namespace) -> None:
    """Train and print the table."""
    steps = defaultdict(list)
    for part, (owner, method) in PARTS.items():
        setattr(owner, method, timed(getattr(owner, method), steps[part]))
    # The run begins a step when it collects, and the last step's end is not measured.
    begun: list[tuple[float, float]] = []
    collect = RolloutSource.collect

    def beginning(*args, **kwargs):
        begun.append(now())
        return collect(*args, **kwargs)

    RolloutSource.collect = beginning
    recipe = load_recipe(
        "rpg",
        [
            f"model.name_or_path={folder / 'model'}",
            f"data.train={folder / 'prompts.jsonl'}",
            f"rewards=[{{function: '{folder / 'reward.py'}:continued'}}]",
            f"output_dir={folder / 'run'}",
            f"train.batch_size={asked.prompts}",
            f"train.steps={asked.steps + 2}",
            f"rollout.completions={asked.completions}",
            f"rollout.max_new_tokens={asked.new}",
            *asked.overrides,
        ],
    )
    run_recipe(recipe)

    # The first step is warm-up.
    whole = [difference(*pair) for pair in pairwise(begun[1:])]
    medians = {part: median(spent[1 : 1 + len(whole)]) for part, spent in steps.items()}
    inside = [medians["sample"], medians["score"]]
    medians["collect, the rest"] = less(medians["collect, the rest"], inside)
    total = median(whole)
    medians["the loop, the rest"] = less(total, list(medians.values()))
    print(
        f"\nDigits: {asked.prompts} prompts x {asked.completions}, at most {asked.new} new tokens, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, medians of "
        f"{len(whole)} steps\n"
    )
    print("| part of a step | ms | CPU ms |\n|---|---|---|")
    for part, (clock, cpu) in [*medians.items(), ("whole step", total)]:
        print(f"| {part} | {1000 * clock:.0f} | {1000 * cpu:.0f} |")


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def difference(begin: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - begin[0], end[1] - begin[1]


def less(whole: tuple[float, float], parts: list) -> tuple[float, float]:
    """What is left of clock and CPU."""
    return whole[0] - sum(part[0] for part in parts), whole[1] - sum(part[1] for part in parts)


def median(spent: list) -> tuple[float, float]:
    return tuple(statistics.median(column) for column in zip(*spent, strict=True))


def timed(method, spent: list):
    """The method, noting the clock and the CPU time of each call."""

    def call(*args, **kwargs):
        begin = now()
        try:
            return method(*args, **kwargs)
        finally:
            spent.append(difference(begin, now()))

    return call


if __name__ == "__main__":
    main()
