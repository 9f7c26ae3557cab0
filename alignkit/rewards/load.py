"""From the recipe's `rewards` list to one reward."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignkit.config.model import ModelConfig, check_reward_model
from alignkit.config.plugins import load_object
from alignkit.config.rewards import RewardConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.load import load_frozen
from alignkit.policies.load_scorer import quiet_loading
from alignkit.policies.made_up import check_made_up
from alignkit.policies.reward_head import has_reward_head, put_reward_head
from alignkit.policies.weights import check_files
from alignkit.rewards.combine import Part, Reward
from alignkit.rewards.ensemble import Ensemble
from alignkit.rewards.functions import FormatMatch, FunctionReward, LengthPenalty
from alignkit.rewards.model import RewardModel
from alignkit.rewards.rewriter import Rewriter
from alignkit.rewards.steps import StepRewards
from alignkit.rewards.verifier import Verifier

log = logging.getLogger("alignkit")


def load_rewards(
    section: Sequence[RewardConfig | Mapping[str, Any]],
    *,
    safe: bool,
    device: Any = "cpu",
    template_time: str = "auto",
) -> Reward:
    """The weighted sum of the section's rewards; reward models go to `device`, and their chat
    templates print `template_time`, that of the run's data.

    Code that the recipe names is announced in the log before it is imported, and refused
    (ConfigError) when `safe`. Raises ConfigError for faults of the section and ModelError for a
    model that is no reward model.
    """
    parsed = [_parsed(entry, number) for number, entry in enumerate(section)]
    seen: Counter[str] = Counter()
    parts = []
    for number, entry in enumerate(parsed):
        name = _name(entry)
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}_{seen[name]}"

        if entry.model is not None:
            call: Callable[..., Any] = load_reward_model(
                entry.model, revision=entry.revision, device=device, template_time=template_time
            )
            if entry.steps is not None:
                call = StepRewards(call, entry.steps, entry.reduce)
        elif entry.ensemble is not None:
            call = load_ensemble(
                entry.ensemble, entry.pessimism, device=device, template_time=template_time
            )
        elif entry.rewriter is not None:
            call = load_rewriter(entry, device=device, template_time=template_time)
        else:
            call = _call(entry, name, f"rewards.{number}", safe)
        to_go = entry.credit == "to_go"
        parts.append(Part(name, call, entry.weight, drop=entry.on_bad == "drop", to_go=to_go))
    return Reward(parts)


def load_ensemble(
    names: Sequence[str],
    pessimism: float = 0.0,
    *,
    device: Any = "cpu",
    template_time: str = "auto",
) -> Ensemble:
    """Reward models as one reward. Raises as `load_reward_model` for each of them."""
    members = [
        load_reward_model(name, device=device, template_time=template_time) for name in names
    ]
    return Ensemble(members, pessimism)


def load_rewriter(
    entry: RewardConfig, *, device: Any = "cpu", template_time: str = "auto"
) -> Rewriter:
    """The rewriter that the entry names. Raises ModelError."""
    assert entry.rewriter is not None
    assert entry.ask is not None
    section = ModelConfig(name_or_path=entry.rewriter, revision=entry.revision)
    model, tokenizer = load_frozen(section, "rewards.rewriter", device=device)
    return Rewriter(model, tokenizer, entry.ask, template_time=template_time)


def load_reward_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    device: Any = "cpu",
    template_time: str = "auto",
    field: str = "rewards.model",
) -> RewardModel:
    """A sequence-classification model with one output, and its tokenizer. Raises ModelError, which
    names `field`. Runs no code of the model's. Its chat template prints `template_time` (auto: the
    machine's clock).
    """
    check_reward_model(name_or_path, field)
    model, tokenizer = load_classifier(name_or_path, revision=revision, device=device, field=field)
    kind = getattr(model.config, "alignkit_outputs", "reward")
    if model.config.num_labels != 1 or kind != "reward":
        what = "is a `judge`" if kind != "reward" else "is no reward model"
        raise ModelError(
            f"{field}: {name_or_path} has {model.config.num_labels} outputs and {what}; "
            "a reward model has num_labels=1"
        )
    return RewardModel(model, tokenizer, template_time=template_time)


def load_classifier(
    name_or_path: str,
    *,
    revision: str | None = None,
    device: Any = "cpu",
    field: str = "rewards.model",
) -> tuple[Any, Any]:
    """A sequence-classification model that knows its pad token, and its tokenizer; also a language
    model with a reward head beside it. Raises ModelError, which names `field`.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if Path(name_or_path).is_dir():
        check_files(Path(name_or_path), field)
    with_head = has_reward_head(name_or_path)
    outputs = {"num_labels": 1} if with_head else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
        with quiet_loading() if with_head else nullcontext():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, revision=revision, output_loading_info=True, **outputs
            )
    except Exception as error:  # loaders raise anything, from OSError to SafetensorError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{field}: {name_or_path} could not be loaded: {reason}") from error

    check_made_up(model, report, name_or_path, field, head=not with_head)
    if with_head:
        put_reward_head(model, name_or_path)

    # The classifier reads the last token that is not padding, so it must know its padding.
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    if config.pad_token_id is None:
        raise ModelError(
            f"{field}: {name_or_path} has neither a pad nor an end token; set pad_token_id in its "
            "config"
        )
    return model.to(device), tokenizer


def _parsed(entry: RewardConfig | Mapping[str, Any], number: int) -> RewardConfig:
    if isinstance(entry, RewardConfig):
        return entry
    try:
        return RewardConfig.model_validate(dict(entry))
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            place = ".".join(["rewards", str(number), *map(str, fault["loc"])])
            faults.append(f"{place}: {fault['msg']} (got {fault['input']!r})")
        raise ConfigError("; ".join(faults)) from None


def _name(entry: RewardConfig) -> str:
    """What metrics and errors call it: the function's name, the model folder's, or the kind."""
    if entry.function or entry.verifier:
        return (entry.function or entry.verifier or "").rpartition(":")[2]
    named = entry.model or entry.rewriter
    return named.rstrip("/").rpartition("/")[2] if named else entry.kind


def _call(entry: RewardConfig, name: str, field: str, safe: bool) -> Callable[..., Any]:
    """The callable of one entry that is no model; `field` is its place in the recipe, for errors."""
    drop = entry.on_bad == "drop"
    if entry.function is not None:
        function = load_object(entry.function, what=f"{field}.function", safe=safe)
        if not callable(function):
            raise ConfigError(
                f"{field}.function: {entry.function} is a {type(function).__name__}, not a function"
            )
        if entry.credit == "to_go" and getattr(function, "causal", None) is not True:
            raise ConfigError(
                f"{field}.credit: to_go leaves out the rewards of earlier tokens, which is right only "
                f"where none of them depends on a later token, and {entry.function} does not say so; "
                "set `causal = True` on the function if it is so, or credit: return"
            )
        return FunctionReward(name, function, timeout=entry.timeout, drop=drop)

    if entry.verifier is not None:
        if safe:
            raise ConfigError(
                f"{field}.verifier: `{entry.verifier}` would run code that the recipe names; "
                "--safe does not allow that"
            )
        log.warning(
            "alignkit: %s.verifier runs code from %s in %d processes",
            field,
            entry.verifier,
            entry.workers,
        )
        return Verifier(
            entry.verifier,
            timeout=entry.timeout or 10.0,
            failed=entry.failed,
            workers=entry.workers,
            memory_mb=entry.memory_mb,
            drop=drop,
        )

    if entry.length is not None:
        return LengthPenalty(entry.length.max_tokens, entry.length.buffer)
    assert entry.format is not None
    return FormatMatch(entry.format)
