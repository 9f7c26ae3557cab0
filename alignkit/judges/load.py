"""From the recipe's `judge` section to a judge."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from alignkit.config.judges import ALLOW_PRIVATE, ChatConfig, JudgeConfig
from alignkit.config.plugins import load_object
from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError
from alignkit.judges.base import Ask, BothOrders, BradleyTerry, Judge
from alignkit.judges.chat import ChatJudge
from alignkit.judges.endpoint import Endpoint
from alignkit.judges.preference import PreferenceJudge
from alignkit.judges.trl_style import from_trl_judge
from alignkit.rewards.checks import refusal_of_signals, within
from alignkit.rewards.load import load_classifier, load_rewards
from alignkit.rewards.model import RewardModel

log = logging.getLogger("alignkit")


def load_judge(
    section: JudgeConfig | Mapping[str, Any],
    *,
    safe: bool,
    device: Any = "cpu",
    allow_private: bool = False,
    template_time: str = "auto",
) -> Judge:
    """The section's judge; the chat templates of its models print `template_time`, that of the
    run's data. `allow_private` lets an endpoint be on a private network, as
    `--allow-private-judge` (an environment variable) does; a recipe cannot.

    Code that the recipe names is announced in the log before it is imported, and refused
    (ConfigError) when `safe`; an endpoint that prompts are sent to is announced too.
    """
    config = section if isinstance(section, JudgeConfig) else _parsed(section)
    if config.rewards is not None:
        reward = load_rewards(config.rewards, safe=safe, device=device, template_time=template_time)
        return BradleyTerry(reward, temperature=config.temperature)
    if config.model is not None:
        return _trained(config.model, config, device, template_time)

    if config.chat is not None:
        ask: Ask = _chat(config.chat, allow_private or bool(os.environ.get(ALLOW_PRIVATE)))
        name = config.chat.model
    elif config.function is not None:
        ask, name = _function(config.function, config.timeout, safe)
    else:
        assert config.trl is not None
        ask, name = _trl(config.trl, config.timeout, safe)
    return BothOrders(ask, name=name, symmetrise=config.both_orders)


def _function(spec: str, timeout: float, safe: bool) -> tuple[Ask, str]:
    """The user's function and its name."""
    function: Any = load_object(spec, what="judge.function", safe=safe)
    if not callable(function):
        raise ConfigError(f"judge.function: {spec} is a {type(function).__name__}, not a function")
    name = spec.rpartition(":")[2]
    return _guarded(function, name, timeout), name


def _trl(spec: str, timeout: float, safe: bool) -> tuple[Ask, str]:
    """The user's judge in TRL's signature, an object or its class, and its name."""
    judge: Any = load_object(spec, what="judge.trl", safe=safe)
    if isinstance(judge, type):
        judge = judge()
    if not hasattr(judge, "judge"):
        raise ConfigError(
            f"judge.trl: {spec} has no method `judge`; give an object or class with TRL's signature"
        )
    name = spec.rpartition(":")[2]
    return _guarded(from_trl_judge(judge), name, timeout), name


def _trained(name: str, config: JudgeConfig, device: Any, template_time: str) -> Judge:
    """Bradley-Terry of a reward model, or a preference model asked in both orders."""
    model, tokenizer = load_classifier(name, device=device, field="judge.model")
    kind_of_others = "reward" if model.config.num_labels == 1 else None
    kind = getattr(model.config, "alignkit_outputs", kind_of_others)

    if kind == "reward":
        reward = RewardModel(model, tokenizer, template_time=template_time)
        return BradleyTerry(reward, temperature=config.temperature)
    if kind not in ("embedding", "joined"):
        raise ModelError(
            f"judge.model: {name} is neither a reward model (num_labels=1) nor trained by "
            "`preference_model`"
        )
    ask = PreferenceJudge(model, tokenizer, template_time=template_time).ask
    return BothOrders(ask, name=name, symmetrise=config.both_orders)


def _guarded(function: Callable[..., Any], name: str, timeout: float) -> Ask:
    """`function` under a wall-clock limit, its exceptions named."""

    what = f"judge {name}"

    def ask(prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Any:
        try:
            return within(timeout, what, lambda: function(prompts, first, second))
        except AlignkitError:
            raise
        except Exception as error:
            refusal = refusal_of_signals(what, error)
            raised = DataError(f"{what} raised {type(error).__name__}: {error}")
            raise refusal or raised from error

    return ask


def _chat(config: ChatConfig, allow_private: bool) -> ChatJudge:
    """A chat model as judge; where prompts are sent to is announced."""
    endpoint = Endpoint(
        config.url,
        api_key_env=config.api_key_env,
        timeout=config.timeout,
        retries=config.retries,
        backoff=config.backoff,
        max_bytes=config.max_bytes,
        allow_private=allow_private,
    )
    log.warning("alignkit: judge.chat sends prompts and completions to %s", endpoint.host)

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
        # The values given are left out: a key may have been put into the wrong place.
        faults = [
            f"{'.'.join(['judge', *map(str, fault['loc'])])}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise ConfigError("; ".join(faults)) from None
