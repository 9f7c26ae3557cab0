"""Where the time of a DPO step and of sampling goes, by torch's profiler: matrix products,
attention, everything else.

    python tests/benchmarks/bench_profile.py [--size 15M] [--vocab 8192]

The table goes to stdout as Markdown.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from bench_dpo import DATA_SETS, Ours
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from world import SHAPES, write_world

from alignkit.batches import Draw
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler

KINDS = {  # the first kind of which a word is in an operator's name
    "matrix products": ("aten::mm", "aten::addmm", "_linear_pointwise"),
    "attention": ("scaled_dot_product", "aten::bmm"),
    "log-softmax": ("log_softmax",),
    "copies": ("copy_", "cat", "clone", "fill_"),
    "optimiser": ("adam",),
}
REST = "elementwise and the rest"


def shares(act: Callable[[int], object]) -> dict[str, float]:
    """Kind -> share of the processor time of the second call, `act(1)`."""
    act(0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        act(1)
    events = found.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    result = dict.fromkeys([*KINDS, REST], 0.0)
    for event in events:
        kind = next(
            (kind for kind, words in KINDS.items() if any(word in event.key for word in words)),
            REST,
        )
        result[kind] += event.self_cpu_time_total / total
    return result


def sampling(folder: Path, vocab: int) -> Callable[[int], object]:
    """Draws 64 completions of 128 tokens, 4 for each prompt of 64."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    prompts = torch.randint(3, vocab, (16, 64), generator=torch.Generator().manual_seed(0))
    sampler = HFSampler(OneModel(model, tokenizer), max_new_tokens=128)
    return lambda step: sampler.sample(list(prompts), Draw(4), step=step, prompt_ids=range(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    given = parser.parse_args()
    disable_progress_bar()
    print(
        f"\nA DPO step, batch 8, live reference, and sampling 64 completions of 128 tokens; {given.size}, vocabulary "
        f"{given.vocab}: shares of the processor's time\n"
    )
    print(f"| what | dtype | {' | '.join([*KINDS, REST])} |")
    print("|---" * (3 + len(KINDS)) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = write_world(Path(name), given.size, given.vocab)
        for data in DATA_SETS:
            for dtype in ("float32", "bfloat16"):
                AcceleratorState._reset_state()  # it holds the precision of the run before
                show(data, dtype, shares(Ours(folder, DATA_SETS[data](16), 8, dtype).step))
        show("sampling", "float32", shares(sampling(folder, given.vocab)))


def show(what: str, dtype: str, found: dict[str, float]) -> None:
    """Print a row of the table."""
    print(
        f"| {what} | {dtype} | {' | '.join(f'{share:.2f}' for share in found.values())} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
