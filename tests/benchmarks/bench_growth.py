"""How the cost of a DPO step grows: with the prompt's length, the number of completions, the
vocabulary and the batch.

    python tests/benchmarks/bench_growth.py [--size 15M] [--repeats 3]

Forward and backward with a live reference on random tokens, one thing changed at a time. The first
prompt alone warms up; a step that takes more than 5 s is counted once. The table goes to stdout as
Markdown.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from world import SHAPES, clock, write_model

from alignkit.batches import Bundle
from alignkit.config.model import TargetConfig
from alignkit.config.train import TrainConfig
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies.module import PolicyModule
from alignkit.policies.pair import PolicyPair
from alignkit.policies.reference import Anchor
from alignkit.training.optimizer import make_optimizer
from alignkit.training.reduction import Reducer

BASE = {"prompt": 256, "completions": 2, "vocabulary": 8192, "prompts": 4}
COMPLETION = 64
GROWTH = {
    "prompt": (128, 512, 2048, 8192),
    "completions": (4, 16, 64),
    "vocabulary": (32768, 131072, 262144),
    "prompts": (8, 16),
}
POSITIONS = max(GROWTH["prompt"]) + COMPLETION
LONG = 5  # seconds of a step that is not repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    disable_progress_bar()
    threads = torch.get_num_threads()
    print(
        f"\nA DPO step, completions of {COMPLETION} tokens, {asked.size} Llama, float32, {threads} threads\n"
    )
    print(f"| {' | '.join(BASE)} | s | tokens of the rows | ms per token |\n|{'---|' * 7}")
    for settings in (
        BASE,
        *({**BASE, name: value} for name, values in GROWTH.items() for value in values),
    ):
        seconds, tokens = measure(asked, **settings)
        print(
            f"| {' | '.join(map(str, settings.values()))} | {seconds:.2f} | {tokens} | {1000 * seconds / tokens:.2f} |",
            flush=True,
        )


def measure(
    asked: argparse.Namespace, prompt: int, completions: int, vocabulary: int, prompts: int
) -> tuple[float, int]:
    """Median seconds of a step and the tokens of its rows. Completions beyond the pair are
    computed; no loss is on them.
    """
    made = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (n,), generator=made)

    bundles = []
    for i in range(prompts):
        ids = [draw(COMPLETION) for _ in range(completions)]
        bundles.append(
            Bundle(
                draw(prompt), ids, [torch.ones(COMPLETION, dtype=torch.bool)] * completions, str(i)
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        module = PolicyModule(
            AutoModelForCausalLM.from_pretrained(
                write_model(Path(folder), asked.size, vocabulary, POSITIONS)
            )
        )
    objective = DPO(beta=0.1)
    pair = PolicyPair(module, None, {"reference": Anchor.of("frozen", module, TargetConfig())})
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    pair.prepare(accelerator, lambda parameters: make_optimizer(TrainConfig(), parameters))
    reducer = Reducer(objective, pair, accelerator, 4096)

    def step(rows: list[Bundle]) -> float:
        """Seconds of a forward and backward."""
        began = clock()
        reducer.backward(rows)
        seconds = clock() - began
        for parameter in pair.parameters():
            parameter.grad = None
        return seconds

    step(bundles[:1])
    seconds = [step(bundles)]
    while len(seconds) < asked.repeats and seconds[0] < LONG:
        seconds.append(step(bundles))
    return statistics.median(seconds), sum(bundle.n_tokens for bundle in bundles)


if __name__ == "__main__":
    main()
