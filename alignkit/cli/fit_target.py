"""`alignkit fit-target`: a target from constraints. What it does is in `alignkit.runs.target`."""

from typing import Annotated

import typer

from alignkit.cli.options import Model, Temperature
from alignkit.cli.pairs import MaxNewTokens, Prompts, Safe

Feature = Annotated[
    list[str],
    typer.Option(
        metavar="FILE.py:NAME=MEAN", help="A feature and the mean it should have; several times."
    ),
]
Samples = Annotated[int, typer.Option(min=2, help="Completions per prompt.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling noise.")]


def fit_target(
    model: Model,
    prompts: Prompts,
    feature: Feature,
    samples: Samples = 64,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    safe: Safe = False,
) -> None:
    """Find the law nearest to a model in which features have given means, for `fdpg` to learn."""
    import shlex

    from alignkit.runs.target import TargetRequest, as_overrides, fit_target, parse_constraint

    constraints = [parse_constraint(text) for text in feature]
    request = TargetRequest(
        model=model,
        prompts=prompts,
        features=[name for name, _ in constraints],
        means=[mean for _, mean in constraints],
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        safe=safe,
    )
    fit = fit_target(request)

    columns = (request.features, fit.before.tolist(), fit.moments.tolist(), fit.lambdas.tolist())
    for name, before, after, weight in zip(*columns):
        typer.echo(
            f"{name}: mean {before:.6g} under the model, {after:.6g} under the target, lambda {weight:.6g}"
        )
    typer.echo(f"{fit.effective_samples:.1f} of {samples} samples of a prompt count for the target")
    typer.echo(f"alignkit train fdpg {shlex.join(as_overrides(request, fit))}")
