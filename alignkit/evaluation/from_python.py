"""`alignkit.evaluate`: what `alignkit eval` measures, from Python."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from alignkit.config.validation import nearest
from alignkit.errors import ConfigError
from alignkit.evaluation.request import Request, checked


def evaluate(models: str | Path | Sequence[str | Path], **options: Any) -> dict[str, Any]:
    """What `alignkit eval` prints, as a dict: score, KL, win rate and more of finished models.

    `models` are run folders or model folders. `options` are those of the command line:
    `reference`, `prompts`, `reward`, `pairs`, `text`, `unrelated`, `correct`, `samples`,
    `max_new_tokens`, `seed`, `credit`, `distance`, `safe`. ConfigError for other names.
    """
    from alignkit.evaluation.evaluate import evaluate as evaluate_request

    allowed = {field.name for field in fields(Request)} - {"models", "recipes", "decoders"}
    for name in options:
        if name not in allowed:
            hint = nearest(name, allowed)
            raise ConfigError(
                f"evaluate has no option `{name}`.{hint} Options: {', '.join(sorted(allowed))}"
            )

    several = [models] if isinstance(models, str | Path) else list(models)
    request = Request([str(model) for model in several], **options)
    return dict(evaluate_request(checked(request)))
