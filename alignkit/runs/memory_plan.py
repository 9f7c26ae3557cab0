"""`alignkit plan`: what a recipe takes of each GPU, and what would make it fit.

Bytes are worked out from the model's config; no weights are read. Rows are taken to be as long as
`data.max_length` allows.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.config.model import ModelConfig
from alignkit.config.recipe import Recipe
from alignkit.config.streams import objective_of
from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from alignkit.batches import Plan
    from alignkit.policies.footprint import Footprint

GB = 10**9
MICRO_BATCH = 16384  # tokens, where the recipe leaves them to a GPU
OFFLOADED_AT_ONCE = 256 * 2**20  # bytes of parameters; see alignkit.training.offload
HEAD_CHUNKS = 4 * (64 - 8) * 2**20  # a GPU's head works on 64 MiB at a time, a CPU's on 8
SAMPLING_TOKENS = 65536  # prompt and completion tokens that are sampled at once
# Numbers of the optimiser's state for each trained number. Adafactor keeps a row and a column of a
# matrix; Muon one moment, but two for embeddings and the head; 8-bit moments are a quarter each.
MOMENTS = {"sgd": 0.0, "adafactor": 0.01, "adamw_8bit": 0.5, "muon": 2.0, "adamw": 2.0}
BYTES = {"auto": 4, "float32": 4, "bfloat16": 2}

# Tried one after the other until the run fits; the first of them change no result.
REMEDIES = (
    "train.shard=true",
    "model.gradient_checkpointing=true",
    "train.micro_batch_tokens=4096",
    "train.micro_batch_tokens=2048",
    "train.offload=true",
    "model.adapter.r=16",
    "model.dtype=bfloat16",
)


@dataclass(frozen=True)
class MemoryPlan:
    """What one run takes on so many GPUs."""

    footprint: "Footprint"
    gpus: int
    memory: dict[str, float]  # what for -> bytes on each GPU, at the moment that takes most
    traffic: dict[str, float]  # what for -> bytes that each GPU sends per step
    micro_batches: int  # per step and GPU
    sampling: float  # bytes on each GPU while completions are sampled; 0: none are

    @property
    def peak(self) -> float:
        """Bytes that each GPU needs."""
        return max(sum(self.memory.values()), self.sampling)


def plan_memory(recipe: Recipe, gpus: int, *, device: str = "cuda") -> MemoryPlan:
    """The plan of a recipe on `gpus` GPUs of any size. Raises ConfigError, ModelError."""
    from alignkit.policies.footprint import footprint

    if recipe.train.batch_size < gpus:
        raise ConfigError(
            f"--gpus {gpus}: train.batch_size {recipe.train.batch_size} is smaller, so some GPUs "
            f"would have no row; set train.batch_size={gpus} or more"
        )
    plan = objective_of(recipe).plan
    budget = recipe.train.micro_batch_tokens
    tokens = MICRO_BATCH if budget == "auto" else budget
    length = min(recipe.data.max_length, tokens)
    rows = _rows_per_step(recipe, plan, gpus)
    micro_batches = max(1, math.ceil(rows * length / tokens))

    compute = "float32" if recipe.train.dtype == "float32" else "bfloat16"
    print_of = footprint(
        _without_task(recipe),
        tokens=min(tokens, math.ceil(rows) * length),
        length=length,
        dtype=compute,
        tensor=_mesh(recipe, gpus)["tensor"],
    )
    memory = _memory(recipe, plan, print_of, gpus, micro_batches, device)
    return MemoryPlan(
        print_of,
        gpus,
        memory,
        _traffic(recipe, plan, print_of, gpus, micro_batches),
        micro_batches,
        _sampling(recipe, plan, print_of, gpus),
    )


def remedies(
    recipe_name: str, overrides: list[str], gpus: int, limit: float
) -> tuple[list[str], MemoryPlan | None]:
    """The settings that make the recipe fit into `limit` bytes per GPU, and the plan with them;
    None where no setting does.

    Remedies are added one by one; what the recipe has already is left out.
    """
    from alignkit.config.recipe import load_recipe

    chosen: dict[str, str] = {}  # by field
    for remedy in REMEDIES:
        before = load_recipe(recipe_name, [*overrides, *chosen.values()])
        if _is_undone(before, remedy):
            continue
        if load_recipe(recipe_name, [*overrides, *chosen.values(), remedy]) == before:
            continue

        chosen[remedy.partition("=")[0]] = remedy
        settings = list(chosen.values())
        plan = plan_memory(load_recipe(recipe_name, [*overrides, *settings]), gpus)
        if plan.peak <= limit:
            return settings, plan
    return list(chosen.values()), None


def _is_undone(recipe: Recipe, remedy: str) -> bool:
    """Whether a remedy would take more than the recipe's own setting, or does not go with it."""
    field, _, value = remedy.partition("=")
    if field == "train.offload":
        return recipe.train.optimizer in ("sgd", "adamw_8bit")
    if field == "model.adapter.r" and recipe.train.mesh is not None:
        return recipe.model.adapter is not None or recipe.train.mesh.tensor > 1
    budget = recipe.train.micro_batch_tokens
    if field == "train.micro_batch_tokens":
        return budget != "auto" and budget <= int(value)
    return field == "model.adapter.r" and recipe.model.adapter is not None


def _without_task(recipe: Recipe) -> ModelConfig:
    """The recipe's model; the embedded task's stands in a folder of its own."""
    if recipe.model.name_or_path != "task":
        return recipe.model
    from alignkit.runs.launch import resolve_task

    task = resolve_task(recipe)
    assert task is not None
    return recipe.model.model_copy(update={"name_or_path": str(task.model_folder)})


def _rows_per_step(recipe: Recipe, plan: "Plan", gpus: int) -> float:
    """Rows of one step on the GPU that has most."""
    per_bundle = {"pair": 2, "rollout": recipe.rollout.completions, "game": 2}.get(plan.data, 1)
    return math.ceil(recipe.train.batch_size / gpus) * per_bundle


def _memory(
    recipe: Recipe,
    plan: "Plan",
    of: "Footprint",
    gpus: int,
    micro_batches: int,
    device: str,
) -> dict[str, float]:
    """Bytes on each GPU while a step's gradient is computed."""
    size = BYTES[recipe.model.dtype]
    # An adapter is trained in float32 over weights of any dtype.
    trained_size = 4 if recipe.model.adapter is not None else size
    mesh = _mesh(recipe, gpus)
    share = mesh["shard"] * mesh["tensor"]
    moments = MOMENTS[recipe.train.optimizer]

    # State that waits on the CPU comes to the GPU a part at a time.
    state = moments * trained_size * of.trained / share
    if recipe.train.offload:
        state = min(state, moments * OFFLOADED_AT_ONCE)

    frozen = of.parameters - of.trained
    memory = {
        "weights": (size * frozen + trained_size * of.trained) / share,
        "gradients": trained_size * of.trained / share,
        "moments of the optimiser": state,
        "anchors": size * of.parameters * _copies(recipe, plan) / share,
        "activations": of.saved,
        "while a layer or a part of the head is computed": of.workspace
        + (HEAD_CHUNKS if device == "cuda" else 0),
    }
    if recipe.train.shard and gpus > 1:
        memory["blocks that are gathered"] = (
            size * _gathered(of) + trained_size * _gathered_gradient(of)
        ) / mesh["tensor"]
    elif gpus > 1:
        memory["buckets of gradients (DDP)"] = trained_size * of.trained

    if micro_batches == 1:
        # A single backward makes gradients as activations go: never both whole.
        memory["gradients"], memory["activations"] = _larger(
            memory["gradients"], memory["activations"]
        )
    return memory


def _gathered(of: "Footprint") -> float:
    """Parameters that are whole at once: the next unit is gathered while one computes. Embedding
    and head are units of their own, but where they are one weight, it stays whole to the end.
    """
    return 2 * of.block + of.rest if of.tied else max(2 * of.block, of.block + of.rest / 2)


def _gathered_gradient(of: "Footprint") -> float:
    if of.tied:
        return of.block_trained + of.rest_trained
    return max(of.block_trained, of.rest_trained / 2)


def _mesh(recipe: Recipe, gpus: int) -> dict[str, int]:
    """How the GPUs stand. ConfigError where they cannot stand like this."""
    if not recipe.train.shard:
        return {"replicate": gpus, "shard": 1, "tensor": 1}
    if recipe.train.mesh is None:
        return {"replicate": 1, "shard": gpus, "tensor": 1}
    return recipe.train.mesh.shape(gpus)


def _larger(gradients: float, activations: float) -> tuple[float, float]:
    return (gradients, 0.0) if gradients > activations else (0.0, activations)


def _copies(recipe: Recipe, plan: "Plan") -> int:
    """Anchors that are whole models of their own."""
    from alignkit.batches import FAMILIES
    from alignkit.policies.reference import resolve_kind

    fixed = not FAMILIES[plan.data].sampled and not plan.samples
    has_adapter = recipe.model.adapter is not None
    kind = resolve_kind(recipe.reference.kind, plan, adapter=has_adapter, fixed_data=fixed)
    others = sum(name != "reference" for name in plan.anchors)
    others += any("proposal" in draw.models for draw in plan.samples)
    return others + (kind not in ("none", "cached", "adapter_off"))


def _traffic(
    recipe: Recipe, plan: "Plan", of: "Footprint", gpus: int, micro_batches: int
) -> dict[str, float]:
    """Bytes that each GPU sends per step: rings pass on (N - 1) / N of what they carry."""
    size = BYTES[recipe.model.dtype]
    trained_size = 4 if recipe.model.adapter is not None else size
    if not recipe.train.shard:
        ring = (gpus - 1) / gpus
        return {"sum of the gradients, once per step": 2 * trained_size * of.trained * ring}

    mesh = _mesh(recipe, gpus)
    ring = (mesh["shard"] - 1) / mesh["shard"] / mesh["tensor"]
    gathers = 2 + _copies(recipe, plan)
    traffic = {
        "weights, gathered for forward, backward and anchors": (
            size * of.parameters * ring * gathers * micro_batches
        ),
        "gradients, scattered": trained_size * of.trained * ring * micro_batches,
    }
    if mesh["replicate"] > 1:
        part = of.trained / (mesh["shard"] * mesh["tensor"])
        among = 2 * (mesh["replicate"] - 1) / mesh["replicate"]
        traffic["gradients, summed over the replicas"] = trained_size * part * among * micro_batches
    if mesh["tensor"] > 1:
        # Attention and MLP of a layer sum their outputs in each forward, their inputs in backward.
        forwards = 1 + recipe.model.gradient_checkpointing + _copies(recipe, plan)
        among = 2 * (mesh["tensor"] - 1) / mesh["tensor"]
        rows = _rows_per_step(recipe, plan, gpus) * mesh["tensor"]
        numbers = rows * recipe.data.max_length * of.width * of.layers
        traffic["hidden states, summed by those that compute together"] = (
            2 * (forwards + 1) * among * numbers * (4 if recipe.train.dtype == "float32" else 2)
        )
    return traffic


def _sampling(recipe: Recipe, plan: "Plan", of: "Footprint", gpus: int) -> float:
    """Bytes on each GPU while its completions are sampled; gradients are gone by then."""
    if not plan.samples or recipe.rollout.engine == "vllm":
        return 0.0
    memory = _memory(recipe, plan, of, gpus, 2, "cuda")
    standing = ("weights", "moments of the optimiser", "anchors", "blocks that are gathered")
    rows = _rows_per_step(recipe, plan, gpus)
    length = min(recipe.data.max_length, SAMPLING_TOKENS)
    tokens = min(SAMPLING_TOKENS, rows * length)
    return sum(memory.get(name, 0.0) for name in standing) + of.cache * tokens
