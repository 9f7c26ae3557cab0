"""`alignkit generate`: completions of a prompt. What it does is in `alignkit.rollout.generate`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignkit.cli.options import Model, Safe, Seed, Temperature
from alignkit.config.escaping import printable
from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from alignkit.config.decode import DecodeConfig

# Toward a reward.
Toward = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="A reward: completions are drawn toward the model's law tilted by it.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(help="With --toward: best_of, soft_best_of or smc; default: soft_best_of."),
]
Beta = Annotated[
    float | None,
    typer.Option(help="With --toward: strength of the tilt e^(reward / beta); not for best_of."),
]
# Turn by turn.
Environment = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="An environment: episodes are played in it and printed turn by turn.",
    ),
]
Turns = Annotated[int, typer.Option(min=1, help="With --environment: most turns of an episode.")]
Particles = Annotated[
    int | None,
    typer.Option(min=1, help="With --toward: candidates or particles; default: 8."),
]


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
    toward: Toward = None,
    method: Method = None,
    beta: Beta = None,
    particles: Particles = None,
    environment: Environment = None,
    turns: Turns = 8,
    safe: Safe = False,
) -> None:
    r"""Sample completions of a prompt, as the model gives them or toward a reward, or episodes with
    an environment. Control characters are printed as escapes, such as \x1b.
    """
    messages: Any = [{"role": "user", "content": prompt}] if chat else prompt
    if environment is not None:
        if toward is not None:
            raise ConfigError(
                "--environment and --toward: episodes are drawn as the model gives them"
            )
        settings: dict[str, Any] = {
            "completions": completions,
            "temperature": temperature,
            "seed": seed,
        }
        settings |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        _show(_episodes(model, messages, environment, safe=safe, turns=turns, **settings))
        return

    decoder = toward_section(toward, method, beta, particles, temperature)
    limits: dict[str, Any] = {
        "completions": completions,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    if decoder is not None:
        _show(_drawn_toward(model, messages, decoder, safe=safe, **limits))
        return

    from alignkit.rollout.generate import generate as sample
    from alignkit.runs.trained_model import load_finished

    texts = sample(load_finished(model), [messages], temperature=temperature, **limits)
    _show(texts[0])


def _drawn_toward(model: str, prompt: Any, decoder: "DecodeConfig", **settings: Any) -> list[str]:
    """Completions of one prompt that are drawn toward a reward."""
    from alignkit.decoding.generate import generate_toward
    from alignkit.runs.trained_model import load_finished

    return generate_toward(load_finished(model), prompt, decoder, **settings)


def _episodes(
    model: str, prompt: Any, environment: str, *, safe: bool, **settings: Any
) -> list[str]:
    """Episodes of one prompt as text, an empty line between them."""
    if safe:
        raise ConfigError(f"--environment: {environment} would run, and --safe does not allow that")

    from alignkit.rollout.environment_pool import WorkerEnvironments
    from alignkit.rollout.play import play, transcript
    from alignkit.runs.trained_model import load_finished

    (episodes,) = play(load_finished(model), [prompt], WorkerEnvironments(environment), **settings)
    return "\n\n".join(map(transcript, episodes)).split("\n")


def _show(texts: list[str]) -> None:
    for text in texts:
        typer.echo(printable(text))


def toward_section(
    toward: str | None,
    method: str | None,
    beta: float | None,
    particles: int | None,
    temperature: float,
) -> "DecodeConfig | None":
    """The `decode` section that the options stand for; None without --toward. ConfigError for
    options that do not belong together.
    """
    given = {"--method": method, "--beta": beta, "--particles": particles}
    if toward is None:
        alone = [name for name, value in given.items() if value is not None]
        if alone:
            raise ConfigError(
                f"{alone[0]} goes with --toward FILE.py:NAME, which says what to seek"
            )
        return None
    if temperature != 1:
        raise ConfigError(
            f"--temperature is {temperature:g}, and --toward tilts the model's own law; leave it out"
        )

    chosen = method or "soft_best_of"
    if chosen not in ("best_of", "soft_best_of", "smc"):
        raise ConfigError(f"--method is {chosen}; allowed: best_of, soft_best_of, smc")
    if beta is None and chosen != "best_of":
        raise ConfigError(f"--method {chosen} needs --beta, such as --beta 0.1")

    from alignkit.config.decode import parsed_decode
    from alignkit.config.text import Origin

    count = particles or 8
    fields = {
        "method": chosen,
        "particles" if chosen == "smc" else "n": count,
        "rewards": [{"function": toward}],
        **({} if beta is None else {"beta": beta}),
        **({"fresh": 0} if chosen == "smc" else {}),  # nobody asks for the KL here
    }
    return parsed_decode({"decode": fields}, Origin("--toward"))
