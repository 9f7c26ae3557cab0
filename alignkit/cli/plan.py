"""`alignkit plan`: what a run takes of each GPU. The arithmetic is in `alignkit.runs.memory_plan`."""

from typing import TYPE_CHECKING, Annotated

import typer

from alignkit.cli.options import Overrides, RecipeName

if TYPE_CHECKING:
    from alignkit.runs.memory_plan import MemoryPlan


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, over all machines.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of a GPU in GB (10^9).")] = 80.0,
) -> None:
    """Work out memory per GPU and traffic per step from the model's config, without its weights."""
    from alignkit.config.recipe import load_recipe
    from alignkit.runs.checks import check_without_torch
    from alignkit.runs.memory_plan import GB, plan_memory, remedies

    changes = overrides or []
    loaded = load_recipe(recipe, changes)
    check_without_torch(loaded)
    planned = plan_memory(loaded, gpus)
    for line in lines_of(planned, loaded.model.name_or_path, gpu_memory):
        typer.echo(line)
    if planned.peak <= gpu_memory * GB:
        return

    settings, fitting = remedies(recipe, changes, gpus, gpu_memory * GB)
    if fitting is None:
        typer.echo("No setting makes it fit; take more GPUs, or larger ones.")
    else:
        typer.echo(f"It would fit with {' '.join(settings)}: {fitting.peak / GB:.1f} GB.")


def lines_of(plan: "MemoryPlan", name: str, gpu_memory: float) -> list[str]:
    """What is printed: the parts of the memory, its peak, and the traffic."""
    from alignkit.runs.memory_plan import GB

    of = plan.footprint
    fits = "fits" if plan.peak <= gpu_memory * GB else "does not fit"
    lines = [
        f"{name}: {of.parameters / 1e9:.3g} B parameters, {of.trained / 1e9:.3g} B of them trained, "
        f"{plan.micro_batches} micro-batches per step and GPU",
        "",
        "GB on each GPU",
        *(f"  {part:48} {size / GB:9.2f}" for part, size in plan.memory.items() if size),
    ]
    if plan.sampling:
        lines.append(f"  {'all of it while completions are sampled':48} {plan.sampling / GB:9.2f}")
    lines += [
        f"  {'at most':48} {plan.peak / GB:9.2f}   of {gpu_memory:g}: {fits}",
        "",
        "GB that each GPU sends per step",
        *(f"  {part:48} {size / GB:9.2f}" for part, size in plan.traffic.items()),
    ]
    return lines
