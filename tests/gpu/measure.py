"""`make gpu`: what alignkit does on this machine's GPU, in at most eight minutes.

    python tests/gpu/measure.py [--sizes 0.6B 1.7B] [--out docs/results/gpu.md]

It checks that attention kernels and layouts agree, takes the fastest one, times DPO and GRPO steps,
beside TRL where that is installed, counts what makes the host wait inside a step, and sends weights to
vLLM where that is installed. Without a GPU it runs the same code on tiny shapes (tests/gpu/test_gpu_script.py).
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from gpu_world import GPU, World, pairs_of
from transfers import transfers
from trl_step import trl_seconds

from alignkit.errors import first_line
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies.attention import choose_kernel
from alignkit.policies.module import causal_lm

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 480.0  # seconds of the whole script; what does not fit is left out, and said
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense, per second
LAYOUTS = {
    "padded, sdpa": ("sdpa", "padded"),
    "shared prefix, sdpa": ("sdpa", "shared_prefix"),
    "shared prefix, flex": ("flex_attention", "shared_prefix"),
}
OBJECTIVES = {"dpo": DPO(beta=0.1), "rpg": RPG(beta=0.01), "grpo": GRPO(beta=0.01)}


class Clock:
    """Seconds since the start, and whether there is time for more."""

    def __init__(self):
        self.began = time.monotonic()

    def left(self):
        return LIMIT - (time.monotonic() - self.began)


def bundles_of(world, name, size, count, length):
    return pairs_of(size, count, length) if name == "dpo" else world.rollouts(count // 4, 4, length)


def gradient(world, bundles):
    """Loss and the gradient of all parameters as one vector, on the CPU."""
    loss = world.reducer.backward(bundles)["loss"]
    parts = [p.grad.flatten().float().cpu() for p in world.pair.parameters()]
    world.optimizer.zero_grad()
    return loss, torch.cat(parts)


def agreement(size, name, count, length):
    """Rows of the table: each layout's loss, and how its gradient lies to the padded one's."""
    lines, reference, bundles = [], None, None
    layouts = {k: v for k, v in LAYOUTS.items() if GPU or v[0] != "flex_attention"}
    for label, (attention, layout) in layouts.items():
        world = World(size, OBJECTIVES[name], attention=attention, layout=layout)
        bundles = bundles or bundles_of(world, name, size, count, length)
        loss, vector = gradient(world, bundles)
        reference = reference or (loss, vector)
        cosine = float(torch.nn.functional.cosine_similarity(vector, reference[1], dim=0))
        length_ratio = float(vector.norm() / reference[1].norm())
        agrees = abs(loss - reference[0]) < 0.02 and cosine > 0.98 and abs(length_ratio - 1) < 0.05
        lines.append(
            f"| {size} | {name} | {label} | {loss:.5f} | {cosine:.5f} | {length_ratio:.4f} | "
            f"{'yes' if agrees else 'NO'} |"
        )
    return lines


def timed(world, collect, repeats):
    """Seconds of a step (median), sampling included, its tokens, and the most memory in bytes."""
    world.step(collect())
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = world.reducer.tokens
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        world.step(collect())
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    tokens = (world.reducer.tokens - before) / repeats
    memory = torch.cuda.max_memory_allocated() if GPU else 0
    return statistics.median(seconds), tokens, memory


def waits(world, bundles):
    """How often the host waits for the GPU in one step."""
    if not GPU:
        world.step(bundles)
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            world.step(bundles)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def speed(size, name, count, length, repeats):
    """One row: time, tokens per second, share of the peak, memory, waits; TRL's time beside it."""
    world = World(size, OBJECTIVES[name])
    kernels = choose_kernel(world.pair) if GPU else choose_kernel(world.pair, ["sdpa", "eager"])
    kernel = causal_lm(world.pair.base.model).config._attn_implementation

    def collect():
        return bundles_of(world, name, size, count, length)

    seconds, tokens, memory = timed(world, collect, repeats)
    halts = waits(world, collect())

    # Forward and backward of the policy and a forward of the reference: 8 products per parameter.
    parameters = sum(p.numel() for p in world.pair.parameters())
    device = torch.cuda.get_device_name() if GPU else ""
    peak = next((value for key, value in PEAK.items() if key in device), None)
    share = f"{8 * parameters * tokens / seconds / peak:.0%}" if peak else "-"
    listed = ", ".join(f"{key} {1000 * value:.0f} ms" for key, value in kernels.items())
    return seconds, (
        f"| {size} | {name} | {kernel} ({listed}) | {1000 * seconds:.0f} ms | "
        f"{tokens / seconds:,.0f} | {share} | {memory / 1e9:.1f} GB | {halts} |"
    )


def report(sizes, count, length, repeats, with_trl=True):
    """The Markdown page, line by line."""
    clock = Clock()
    device = torch.cuda.get_device_name() if GPU else "no GPU: a CPU, tiny shapes"
    lines = [
        "# On a GPU",
        "",
        f"Written by `make gpu` on: {device}; torch {torch.__version__}.",
        "",
        "| model | objective | layout | loss | cosine with padded | length | agrees |",
        "|---|---|---|---|---|---|---|",
    ]
    left_out = []
    for size in sizes:
        for name in OBJECTIVES:
            if clock.left() < LIMIT / 2:
                left_out.append(f"agreement of {name} on {size}")
                continue
            lines += guarded(lambda s=size, n=name: agreement(s, n, count, length), left_out)

    lines += [
        "",
        "| model | objective | attention | step | tokens/s | share of peak | memory | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    beside = []
    for size in sizes:
        for name in ("dpo", "grpo"):
            if clock.left() < LIMIT / 8:
                left_out.append(f"speed of {name} on {size}")
                continue
            measured = guarded(lambda s=size, n=name: speed(s, n, count, length, repeats), left_out)
            if measured:
                lines.append(measured[1])
                beside.append((size, name, measured[0]))
    if with_trl:
        lines += ["", *beside_trl(beside, count, length, repeats, clock, left_out)]
    lines += ["", *guarded(lambda: transfers(sizes[0], clock.left), left_out, "weights to vLLM")]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {what}" for what in left_out)]
    return lines


def beside_trl(measured, count, length, repeats, clock, left_out):
    """How many times as long TRL takes for the same step, with and without Liger's kernels."""
    lines = []
    for size, name, ours in measured:
        for liger in (False, True):
            what = f"TRL's {name} on {size}, {'with' if liger else 'without'} Liger"
            if clock.left() < LIMIT / 10:
                left_out.append(what)
                continue
            theirs = guarded(
                lambda s=size, n=name, x=liger: trl_seconds(s, n, count, length, repeats, x),
                left_out,
                what,
            )
            if theirs:
                lines.append(f"- {what}: {theirs / ours:.2f} times as long")
    return lines


def guarded(measure, left_out, what="a measurement"):
    """The result of a measurement; nothing where it fails, which the page says."""
    try:
        return measure()
    except Exception as error:  # the rest of the page is worth more than a traceback
        left_out.append(f"{what} failed: {type(error).__name__}: {first_line(error)}")
        return []
    finally:
        if GPU:
            torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.6B", "1.7B"] if GPU else ["tiny"])
    parser.add_argument("--pairs", type=int, default=32 if GPU else 4)
    parser.add_argument("--length", type=int, default=256 if GPU else 8)
    parser.add_argument("--repeats", type=int, default=5 if GPU else 1)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu.md")
    asked = parser.parse_args()
    sizes = (asked.pairs, asked.length, asked.repeats)
    text = "\n".join(report(asked.sizes, *sizes, with_trl=not asked.without_trl)) + "\n"
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
