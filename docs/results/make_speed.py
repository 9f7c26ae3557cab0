"""Writes speed.md and speed_growth.png: what the benchmarks printed, with their commands.

Over an hour on two cores, which nothing else should use:

    python docs/results/make_speed.py

Run one of them; the other tables stay as they are. `--only` without a name takes seconds:

    python docs/results/make_speed.py --only group
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# For the tables that take long: the two of TRL's four settings that are the faster ones in the first table.
FASTER = "'no checkpointing, 2 x 4' 'checkpointing, 2 x 4'"
BENCHMARKS = {  # part of the page -> the command behind tests/benchmarks/
    "dpo_float32": "bench_dpo.py --steps 5",
    "dpo_bfloat16": "bench_dpo.py --steps 4 --dtype bfloat16",
    "dialogues": f"bench_dpo.py --data dialogues --steps 3 --settings {FASTER}",
    "dialogues_bfloat16": f"bench_dpo.py --data dialogues --steps 3 --dtype bfloat16 --settings {FASTER}",
    "larger": f"bench_dpo.py --size 45M --vocab 32768 --steps 3 --settings {FASTER}",
    "epoch": "bench_epoch.py",
    "grpo": "bench_grpo.py --steps 2 --settings 'no checkpointing, quarters' 'checkpointing, quarters'",
    "grpo_bfloat16": "bench_grpo.py --steps 2 --dtype bfloat16 --settings 'no checkpointing, quarters'",
    "group": "bench_group.py --steps 6",
    "radpo": "bench_radpo.py",
    "sweep": "bench_sweep.py",
    "rollouts": "bench_rollouts.py",
    "rollouts_vllm": "bench_rollouts.py --vllm .venv-vllm/bin/python",
    "small": "bench_small.py",
    "head": "bench_head.py",
    "guard": "bench_guard.py",
    "growth": "bench_growth.py",
    "profile": "bench_profile.py",
}

GROWING = ("prompt", "completions", "vocabulary", "prompts")

TEXT = """# Speed and memory

What the benchmarks printed on a machine with two CPU cores and no GPU, beside TRL 1.16 in the same run: both sides take a step
in turn, and the ratios are what to read. `make bench` runs them all with their defaults; `docs/results/make_speed.py` wrote this
page.

How alignkit saves work:

- **The prompt once.** A row is a tree: the prompt, and the completions that branch off it.
- **No pads.** On a CPU the trees of a micro-batch stand end to end in one row, and attention is computed for each stretch
  without a branch over what it sees, in float32 also where the rest is bfloat16. Prices worked out from the shapes decide
  whether that is cheaper than rows side by side, so the same run always takes the same way. On a GPU trees stand end to end with
  `model.attention=flex_attention`.
- **The last layer on what is read.** Of a prompt nothing but the last token's state goes into the head, so the last layer of the
  Llama family computes keys and values for the others, and nothing else (in packed rows on a CPU). Its norms and rotations are
  functions with gradients of their own, and attention reads keys and values where they lie.
- **Three of four inner tensors** of a gated MLP are kept for backward in those layers; the fourth is computed again.
- **The head on trained tokens only**, in chunks: log-probs, entropy and statistics in one pass, computed again in backward
  unless there are few.
- **The reference once.** Where the data are fixed its log-probs are stored (`reference.kind: cached`, the default); with
  `reference.store` once for a whole sweep. The tables of steps below keep it live on both sides.
- **A frozen reference once per rollout.** Where the loss compares whole vocabularies and each rollout is one minibatch, the hidden
  states that its credit has read are the ones that its loss reads.
- **No pass over a rollout that nobody reads.** Where an objective's credit needs scores alone, as GRPO's does, the policy is asked
  once, with the gradient; one prompt's completions show whether sampler and trainer agree.
- **CVaR without a sort**: the boundary of the tail is searched for in bins.
- **Waiting without turning.** On a machine that others use too, OpenMP's threads give their core away early while they wait for
  each other, unless `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` says otherwise (`python tests/benchmarks/bench_busy.py`).
- **Sampling**: one prefill per prompt, whose keys and values all its completions read in one product (on a CPU in float32);
  weights packed once per rollout instead of in every product, those of layers with the same input as one; a completion's own
  values read as rows of an embedding, at the memory's speed; finished rows leave the batch.

## DPO

TRL with and without gradient checkpointing, in whole batches (8 x 1) and in quarters that are accumulated (2 x 4, which cost it
fewer pads). "Floor / step": the share of alignkit's step that are the matrix products nobody can leave out, each shape timed on
the machine in the same run. "alignkit's share": of the peak memory, each side in a process of its own, libraries counted; "with
its checkpointing": with `model.gradient_checkpointing=true` on alignkit's side.

{dpo_float32}

{dpo_bfloat16}

Dialogues of five turns, so that prompts are long, beside the two of TRL's settings that are the faster ones above:

{dialogues}

{dialogues_bfloat16}

A larger model and vocabulary, beside the same two:

{larger}

## A whole epoch

What a user waits for: each side in a process of its own, from its start to its end, with imports, loading, tokenising, evaluation,
checkpoints and the finished model. "Before the first step" holds the scoring by the reference where it is done once for all
rows, which is alignkit's default and TRL's `precompute_ref_log_probs`. TRL evaluates in batches of the size it trains in.

{epoch}

## A whole GRPO step

Sampling, scores and update, beside TRL with updates in quarters of the batch, which cost it fewer pads.

{grpo}

{grpo_bfloat16}

## Other updates

{group}

{radpo}

{sweep}

## Sampling

{rollouts}

vLLM's build for CPUs, in an environment of its own (`make test-vllm` makes it):

{rollouts_vllm}

## A small model's online step

{small}

## Memory of the head, cost of the guard

{head}

{guard}

## Growth

{growth}

![time of a step against prompt length, completions, vocabulary and prompts](speed_growth.png)

What many rows cost before the first step is measured by `python tests/benchmarks/bench_data.py --rows 1000000`, with
`--store FOLDER` also the reference's log-probs of all of them, and resuming a run of as many logged steps by
`python tests/benchmarks/bench_resume.py --rows 1000000`.

## What limits it

{profile}

In float32 the matrix products are most of a step: however good the rest, the ratio to a setting of TRL cannot pass TRL's own
ratio to the floor, which is the ratio in the table divided by "floor / step". Long prompts add attention; in bfloat16 the
products are so fast that attention and elementwise operations weigh as much. Memory: the libraries, the weights, the reference, gradients and Adam's
moments are there whatever the activations take.

Sampling is bound by the products of 64 rows, at the machine's full speed, by reading the keys and values of the completions' own
tokens, at the memory's, and by hundreds of small operations for each token, which are the last column. vLLM computes the same
products and has a kernel for each of the other parts. A small model's online step has six forwards' worth of products, one of them in
sampling, two in scoring by policy and reference and three in the update, and beside them thousands of small operations.

No GPU was at hand: flex attention's gradients and the benchmark's GPU shapes were never run.
"""


def run(command: str) -> str:
    """What a benchmark prints."""
    script, *arguments = shlex.split(command)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, str(ROOT / "tests" / "benchmarks" / script), *arguments]
    return subprocess.run(
        call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def table(printed: str) -> list[dict[str, float]]:
    """The rows of a Markdown table of numbers."""
    lines = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    names = [name.strip() for name in lines[0]]
    return [dict(zip(names, map(float, row), strict=True)) for row in lines[2:]]


def draw_growth(printed: str, to: Path) -> None:
    """Seconds of a step against each quantity that grows, the others as in the first row; dashed:
    in proportion.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = table(printed)
    base = rows[0]
    figure, panels = pyplot.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
    for panel, name in zip(panels, GROWING, strict=True):
        line = sorted(
            (row[name], row["s"])
            for row in rows
            if all(row[other] == base[other] for other in GROWING if other != name)
        )
        x, y = zip(*line, strict=True)
        panel.loglog(x, y, "o-")
        panel.loglog(x, [y[0] * value / x[0] for value in x], "--", color="grey", linewidth=1)
        panel.set_xticks(x, map(_short, x))
        panel.minorticks_off()
        panel.set_xlabel(
            {"prompt": "tokens of the prompt", "completions": "completions of a prompt"}.get(
                name, name
            )
        )
    seconds = [0.5, 1, 2, 5, 10, 20, 50, 100]
    panels[0].set_yticks(seconds, map(str, seconds))
    panels[0].set_ylabel("seconds of a step")
    figure.savefig(to, dpi=110)


def _short(value: float) -> str:
    """A number as a tick's label: thousands of 1024 as 8k."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS), help="benchmarks to run"
    )
    args = parser.parse_args()
    saved = HERE / "speed.json"
    found = json.loads(saved.read_text()) if saved.exists() else {}
    for name in args.only:
        print(BENCHMARKS[name], flush=True)
        found[name] = {"command": BENCHMARKS[name], "printed": run(BENCHMARKS[name]).strip()}
        saved.write_text(json.dumps(found, indent=1) + "\n")
    if missing := [name for name in BENCHMARKS if name not in found]:
        parser.exit(0, f"not yet run, so no page: {', '.join(missing)}\n")
    parts = {
        name: f"`python tests/benchmarks/{part['command']}`\n\n{part['printed']}"
        for name, part in found.items()
    }
    (HERE / "speed.md").write_text(TEXT.format(**parts))
    draw_growth(found["growth"]["printed"], HERE / "speed_growth.png")
    print(f"written to {HERE / 'speed.md'}")


if __name__ == "__main__":
    main()
