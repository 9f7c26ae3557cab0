"""`alignkit pairs`: preference pairs from a model. What it does is in `alignkit.runs.pairs`."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from alignkit.cli.options import Model, Temperature
from alignkit.config.iterate import PairMethod
from alignkit.errors import ConfigError

METHODS = get_args(PairMethod)

Prompts = Annotated[
    str,
    typer.Argument(metavar="PROMPTS", help="A file, a dataset folder, a hub name, or task:NAME."),
]
Reward = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME|MODEL", help="A function or a reward model; default: the task's own."
    ),
]
LabelTemperature = Annotated[
    float,
    typer.Option(
        min=0,
        help="The first wins with probability sigmoid(difference / this); 0: the higher score.",
    ),
]
Active = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL",
        help="Reward models, at least two: the reward is asked about the pairs alone on which they "
        "disagree most.",
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A reward model that proposes the pairs, its best completions against its worst; the "
        "reward labels them.",
    ),
]
To = Annotated[Path, typer.Option(help="The file to write, JSON lines.")]
MethodName = Annotated[str, typer.Option(help=f"How pairs are made: {', '.join(METHODS)}.")]
Samples = Annotated[int, typer.Option(min=2, help="Completions per prompt.")]
PerPrompt = Annotated[int, typer.Option(min=1, help="Most pairs per prompt (best_worst: one).")]
Beta = Annotated[float, typer.Option(help="rejection: samples of model * exp(score / beta).")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling noise and the labels.")]
Safe = Annotated[bool, typer.Option("--safe", help="Refuse to run a reward function.")]


def pairs(
    model: Model,
    prompts: Prompts,
    to: To,
    reward: Reward = None,
    method: MethodName = "bradley_terry",
    samples: Samples = 4,
    per_prompt: PerPrompt = 1,
    label_temperature: LabelTemperature = 1.0,
    beta: Beta = 0.5,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    safe: Safe = False,
    active: Active = None,
    student: Student = None,
) -> None:
    """Make preference pairs: sample from a model, score, label, write a file to train on."""
    if method not in METHODS:
        raise ConfigError(
            f"pairs: there is no method `{method}`; it is one of {', '.join(METHODS)}"
        )

    from alignkit.runs.pairs import PairRequest, make_pairs

    request = PairRequest(
        model=model,
        prompts=prompts,
        reward=reward,
        method=cast(PairMethod, method),
        samples=samples,
        pairs=per_prompt,
        label_temperature=label_temperature,
        beta=beta,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        safe=safe,
        active=active or (),
        student=student,
    )
    for name, count in make_pairs(request, to).items():
        typer.echo(f"{count:8} {name}")
    typer.echo(f"{to}: train with `alignkit train dpo data.train={to}`")
