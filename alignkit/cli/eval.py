"""`alignkit eval`: finished models measured. What it does is in `alignkit.evaluation.evaluate`."""

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignkit.cli.lasting_imports import lasting_imports
from alignkit.cli.options import AllowPrivateJudge, Safe, Seed
from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from alignkit.evaluation.request import Request

# What is measured, and from where.
Models = Annotated[
    list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders, models, or task:NAME.")
]
Reference = Annotated[
    str | None,
    typer.Option(help="What KL is measured from; default: the model the runs started from."),
]

# The data: each option adds its own measurements.
Prompts = Annotated[
    str | None,
    typer.Option(
        help="Prompts: a file, or task:NAME; default: the run's data.eval, else its task's."
    ),
]
Reward = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="Score of a completion; default: the run's rewards, else its task's.",
    ),
]
Pairs = Annotated[
    str | None, typer.Option(help="Held-out pairs: accuracy and calibration of the preferences.")
]
HeldOutText = Annotated[
    str | None, typer.Option(help="Held-out text (rows with `text`): perplexity.")
]
Unrelated = Annotated[
    str | None, typer.Option(help="Prompts of another kind: KL on them means forgetting.")
]
RewardBenchmark = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="The models are reward models, preference models or files with a judge: how often "
        "they put the right answer first.",
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="reward-benchmark: prompts that are texts are messages of a user's."
    ),
]
Correct = Annotated[
    float | None,
    typer.Option(
        help="A completion with at least this score is correct: adds pass@k and majority@k."
    ),
]
WronglyAccepted = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="RATE",
        help="With --correct: how often the first of k answers is right that a verifier accepts "
        "which lets this share of wrong ones pass.",
    ),
]

# The sampling.
Samples = Annotated[
    int, typer.Option(min=2, help="Completions per prompt, with the same noise for every model.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a completion; default: the run's.")
]
To = Annotated[Path, typer.Option(help="File for the results.")]
Html = Annotated[
    Path | None,
    typer.Option(metavar="PAGE.html", help="Also one page with the picture and the samples."),
]
Distance = Annotated[
    int | None,
    typer.Option(
        min=4,
        metavar="SAMPLES",
        help="Nats of each run from its own optimum, log Z from so many base samples per prompt.",
    ),
]
Credit = Annotated[
    bool,
    typer.Option("--credit", help="Colour the tokens of the page's samples by their log-ratio."),
]


def evaluate(
    models: Models,
    reference: Reference = None,
    prompts: Prompts = None,
    reward: Reward = None,
    pairs: Pairs = None,
    text: HeldOutText = None,
    unrelated: Unrelated = None,
    reward_benchmark: RewardBenchmark = None,
    chat: Chat = False,
    correct: Correct = None,
    wrongly_accepted: WronglyAccepted = None,
    samples: Samples = 8,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    to: To = Path("eval.json"),
    html: Html = None,
    credit: Credit = False,
    distance: Distance = None,
    safe: Safe = False,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Measure finished models: score, KL to where they started, win rate and more, as a table and
    as JSON.
    """
    from alignkit.evaluation.request import Request

    request = Request(
        models=models,
        reference=reference,
        prompts=prompts,
        reward=reward,
        pairs=pairs,
        text=text,
        unrelated=unrelated,
        correct=correct,
        wrongly_accepted=wrongly_accepted,
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        credit=credit,
        distance=distance,
        safe=safe,
    )
    if to.exists():
        raise ConfigError(f"{to} exists already; name another file with --to")
    if reward_benchmark is not None:
        _benchmark(request, reward_benchmark, to, html, chat=chat)
    elif chat:
        raise ConfigError("--chat is for the prompts of --reward-benchmark; leave it out")
    else:
        _measure(request, to, html)


def _measure(request: "Request", to: Path, html: Path | None) -> None:
    """Measure models on samples of theirs."""
    if html is not None:
        check_page(html)

    from alignkit.evaluation.request import checked

    # What is wrong with the request is said before torch is imported, which takes seconds.
    request = checked(request)
    with lasting_imports():
        from alignkit.evaluation.evaluate import evaluate_to_file

    evaluate_to_file(request, to, html)
    typer.echo(f"the figures are in {to}" + (f", the page is {html}" if html else ""))


def _benchmark(request: "Request", file: str, to: Path, html: Path | None, *, chat: bool) -> None:
    """Score the answers of a benchmark. ConfigError for options that sampling alone has."""
    used = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(request)
        if field.name not in ("models", "safe", "recipes", "decoders")
        and getattr(request, field.name) != field.default
    ]
    used += ["--html"] if html is not None else []
    if used:
        raise ConfigError(
            f"--reward-benchmark scores answers that are given; leave out {', '.join(used)}"
        )
    from rich.console import Console

    from alignkit.evaluation.reward_benchmark import benchmark, show
    from alignkit.files import write_json, writing

    results = benchmark(request.models, file, chat=chat, safe=request.safe)
    show(results, Console())
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        write_json(to, results)
    typer.echo(f"the figures are in {to}")


def check_page(page: Path) -> None:
    """ConfigError for a page that exists, or that could not be drawn here."""
    if page.exists():
        raise ConfigError(f"{page} exists already; name another file with --html")
    if find_spec("matplotlib") is None:
        raise ConfigError("the page's picture needs matplotlib: pip install 'alignkit[eval]'")
