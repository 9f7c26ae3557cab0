"""`alignkit generate`: completions of a prompt. What it does is in `alignkit.rollout.generate`."""

from typing import Annotated, Any

import typer

from alignkit.cli.options import Model, Seed, Temperature
from alignkit.config.escaping import printable


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to complete.")],
    completions: Annotated[int, typer.Option(min=1, help="Completions to sample.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of a completion; default: 64, or what the context leaves.",
        ),
    ] = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a user's message, through the chat template."
        ),
    ] = False,
) -> None:
    r"""Sample completions of a prompt. Control characters are printed as escapes, such as \x1b."""
    from alignkit.rollout.generate import generate as sample
    from alignkit.runs.trained_model import load_finished

    text_or_messages: Any = [{"role": "user", "content": prompt}] if chat else prompt
    texts = sample(
        load_finished(model),
        [text_or_messages],
        completions=completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    for text in texts[0]:
        typer.echo(printable(text))
