"""From the recipe's `judge` section to a judge."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from alignkit.config.judges import ALLOW_PRIVATE, ChatConfig, JudgeConfig
from alignkit.config.plugins import load_object
from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError
from alignkit.judges.base import BothOrders, BradleyTerry, Judge
from alignkit.judges.chat import ChatJudge
from alignkit.judges.endpoint import Endpoint
from alignkit.judges.preference import PreferenceJudge
from alignkit.judges.trl_style import from_trl_judge
from alignkit.rewards.checks import within
from alignkit.rewards.load import load_classifier, load_rewards
from alignkit.rewards.model import RewardModel


def load_judge(
    section: JudgeConfig | Mapping[str, Any],
    *,
    safe: bool,
    device: Any = "cpu",
    allow_private: bool = False,
) -> Judge:
    """The section's judge. `allow_private` lets an endpoint be on a private network, as
    `--allow-private-judge` (an environment variable) does; a recipe cannot.

    Code that the recipe names is announced on stderr before it is imported, and refused
    (ConfigError) when `safe`; an endpoint that prompts are sent to is announced too.
    """
    config = section if isinstance(section, JudgeConfig) else _parsed(section)
    if config.rewards is not None:
        return BradleyTerry(
            load_rewards(config.rewards, safe=safe, device=device), temperature=config.temperature
        )
    if config.model is not None:
        return _trained(config, device)
    if config.chat is not None:
        allow_private = allow_private or bool(os.environ.get(ALLOW_PRIVATE))
        return BothOrders(
            _chat(config.chat, allow_private), name=config.chat.model, symmetrise=config.both_orders
        )
    spec, field = (
        (config.function, "function") if config.function is not None else (config.trl or "", "trl")
    )
    found: Any = load_object(spec, what=f"judge.{field}", safe=safe)
    name = spec.rpartition(":")[2]
    if field == "trl":
        found = found() if isinstance(found, type) else found
        if not hasattr(found, "judge"):
            raise ConfigError(
                f"judge.trl: {spec} has no method `judge`; give an object or class with TRL's signature"
            )
        found = from_trl_judge(found)
    if not callable(found):
        raise ConfigError(f"judge.function: {spec} is a {type(found).__name__}, not a function")
    return BothOrders(
        _guarded(found, name, config.timeout), name=name, symmetrise=config.both_orders
    )


def _trained(config: JudgeConfig, device: Any) -> Judge:
    """Bradley-Terry of a reward model, or a preference model asked in both orders."""
    name = str(config.model)
    model, tokenizer = load_classifier(name, device=device, field="judge.model")
    kind = getattr(
        model.config, "alignkit_outputs", "reward" if model.config.num_labels == 1 else None
    )
    if kind == "reward":
        return BradleyTerry(RewardModel(model, tokenizer), temperature=config.temperature)
    if kind not in ("embedding", "joined"):
        raise ModelError(
            f"judge.model: {name} is neither a reward model (num_labels=1) nor trained by `preference_model`"
        )
    return BothOrders(
        PreferenceJudge(model, tokenizer).ask, name=name, symmetrise=config.both_orders
    )


def _guarded(function: Callable[..., Any], name: str, timeout: float) -> Callable[..., Any]:
    """`function` under a wall-clock limit, its exceptions named."""

    def ask(prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Any:
        try:
            return within(timeout, f"judge {name}", lambda: function(prompts, first, second))
        except AlignkitError:
            raise
        except Exception as error:
            raise DataError(f"judge {name} raised {type(error).__name__}: {error}") from error

    return ask


def _chat(config: ChatConfig, allow_private: bool) -> ChatJudge:
    endpoint = Endpoint(
        config.url,
        api_key_env=config.api_key_env,
        timeout=config.timeout,
        retries=config.retries,
        backoff=config.backoff,
        max_bytes=config.max_bytes,
        allow_private=allow_private,
    )
    print(f"alignkit: judge.chat sends prompts and completions to {endpoint.host}", file=sys.stderr)
    return ChatJudge(
        endpoint,
        config.model,
        criterion=config.criterion,
        max_tokens=config.max_tokens,
        concurrency=config.concurrency,
        breaker=config.breaker,
    )


def _parsed(section: Mapping[str, Any]) -> JudgeConfig:
    try:
        return JudgeConfig.model_validate(dict(section))
    except ValidationError as error:
        # without the values given: a key may have been put into the wrong place
        faults = "; ".join(
            ".".join(["judge", *map(str, f["loc"])]) + f": {f['msg']}"
            for f in error.errors(include_url=False)
        )
        raise ConfigError(faults) from None
