"""Writes the tables of `docs/scale.md` that `alignkit plan` works out.

Run it from the checkout: `python docs/make_scale.py`. The configs of the four models are in
`docs/scale_models`; no weights are read.
"""

from pathlib import Path

from alignkit.config.recipe import load_recipe
from alignkit.runs.memory_plan import GB, MemoryPlan, plan_memory

DOCS = Path(__file__).resolve().parent
BEGIN = "<!-- written by docs/make_scale.py -->"
END = "<!-- end -->"
MODELS = {
    "8 B": "qwen3-8b",
    "32 B": "qwen3-32b",
    "70 B": "llama-70b",
    "235 B-A22B": "qwen3-235b-a22b",
}
GPUS = (8, 64, 512)
MEMORY = 80  # GB of one GPU
SHARED = [
    "train.shard=true",
    "model.gradient_checkpointing=true",
    "train.batch_size=512",
    "train.micro_batch_tokens=4096",
]
KINDS = {
    "all weights in float32": [],
    "LoRA r=16 on bfloat16": ["model.adapter.r=16", "model.dtype=bfloat16"],
}


def plan_of(model: str, kind: str, gpus: int) -> MemoryPlan:
    """The plan of DPO on a model."""
    settings = [f"model.name_or_path={DOCS / 'scale_models' / MODELS[model]}", *SHARED]
    return plan_memory(load_recipe("dpo", [*settings, *KINDS[kind]]), gpus)


def cell(plan: MemoryPlan) -> str:
    """Memory per GPU and traffic per step."""
    peak = plan.peak / GB
    shown = f"{peak:.0f} GB" if peak <= MEMORY else f"({peak:.0f} GB)"
    return f"{shown}; {sum(plan.traffic.values()) / GB:,.0f} GB"


def table(kind: str) -> list[str]:
    """The Markdown table of one way to train."""
    lines = [
        f"DPO, {kind}:",
        "",
        "| model | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |",
        "|---|" + "---|" * len(GPUS),
    ]
    for model in MODELS:
        cells = [cell(plan_of(model, kind, gpus)) for gpus in GPUS]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def written(page: str) -> str:
    """The page with its tables replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join("\n".join(table(kind)) for kind in KINDS)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


if __name__ == "__main__":
    file = DOCS / "scale.md"
    file.write_text(written(file.read_text()))
