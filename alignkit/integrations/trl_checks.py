"""What fits into TRL's trainers: releases, objectives, arguments.

Imports no trl; every refusal is one sentence.
"""

import copy
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import MISSING
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from alignkit.batches import FAMILIES, Family, PairBatch, RolloutBatch, Term, TokenLogps
from alignkit.errors import ConfigError
from alignkit.integrations.trl_settings import (
    BY_LENGTH,
    OWN_LOSS,
    TOKEN_SUMS,
    has_one_ratio,
    instead,
    per_sequence,
    says_the_same,
)
from alignkit.objectives.base import Objective, Weighted
from alignkit.objectives.preference.ipo import IPO

SUPPORTED = "trl>=0.29.1,<2, not 1.15.0 on a machine without a GPU"
TRL_LOG = "trl.trainer.grpo_trainer"  # where GRPOTrainer logs its own warnings
ANY_VERSION = "ALIGNKIT_ANY_TRL"  # environment: try an untested version


def check_version() -> None:
    """Raise ConfigError where TRL is missing or a release that was not tried."""
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ConfigError(f"trl is not installed; install one of {SUPPORTED}") from None
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed)[:3])
    # The log-prob kernel of this release needs a GPU.
    broken = numbers == (1, 15, 0) and not torch.cuda.is_available()
    supported = (0, 29, 1) <= numbers < (2,) and not broken
    if supported or os.environ.get(ANY_VERSION):
        return
    raise ConfigError(
        f"trl {installed} is installed; supported is {SUPPORTED} "
        f"(set {ANY_VERSION}=1 to try it all the same)"
    )


def check_instance(objective: Any) -> None:
    """Raise ConfigError for what is no objective, or its class."""
    if not isinstance(objective, Objective):
        given = objective.__name__ if isinstance(objective, type) else type(objective).__name__
        raise ConfigError(
            f"as_trl_trainer: objective is {given}, not an objective's instance; "
            "give one, such as DPO(beta=0.1)"
        )


def check_objective(objective: Any, family: Family, base: str) -> None:
    """Raise ConfigError for what trainer `base`, whose batches are
    of `family` (pair or rollout), cannot train.
    """
    check_instance(objective)
    name = type(objective).__name__
    plan = objective.plan

    # A pair trainer also takes demonstrations: it trains on the chosen completions.
    if plan.data not in (family, *FAMILIES[family].serves):
        trainers = {"pair": "DPOTrainer", "sequence": "DPOTrainer", "rollout": "GRPOTrainer"}
        hint = "train it with alignkit's own loop (`alignkit train`)"
        if plan.data in trainers:
            hint = f"use base={trainers[plan.data]}"
        raise ConfigError(
            f"as_trl_trainer: {name} learns from {plan.data} data, which {base} does not have; "
            f"{hint}"
        )

    # What alignkit's own loop gives an objective and TRL's does not.
    needs = {
        "a value head": plan.values or plan.bins,
        "the log-partition of the logits": plan.partition,
        "a head of its own": plan.outputs,
        "completions drawn beside the rows": family == "pair" and plan.samples,
        "completions of another policy": any(
            set(draw.models) != {"policy"} for draw in plan.samples
        ),
        "the whole step's rows at once": family == "rollout" and plan.coupled,
        "prompts with other prompts' completions": plan.mismatched,
        "a teacher (base=DistillationTrainer has one, for Distill(share=1.0))": plan.needs_teacher,
        "a second anchor": set(plan.anchors) - {"reference", "teacher"},
        "a state carried from step to step": objective.init_state(),
        "epochs or minibatches of its own (in TRL: args.num_iterations and "
        "args.steps_per_generation)": plan.epochs * plan.minibatches > 1,
    }
    missing = [need for need, wanted in needs.items() if wanted]
    if missing:
        raise ConfigError(
            f"as_trl_trainer: {name} needs {', '.join(missing)}, which {base} cannot give; "
            "use `alignkit train`"
        )
    if family == "rollout":
        advantage_rule(objective, 4)


def warn_of_other_forms(objective: Objective) -> None:
    """Warn of an objective whose default differs from the loss that TRL has under the same name."""
    parts = (
        [part for part, _ in objective.parts] if isinstance(objective, Weighted) else [objective]
    )
    if any(isinstance(part, IPO) and part.form == "sum" for part in parts):
        warnings.warn(
            "as_trl_trainer: IPO(form='sum') adds up the log-ratios of a completion's tokens, as "
            "in the paper, where TRL's loss_type='ipo' takes their mean; for TRL's loss use "
            "form='mean' with tau set to TRL's beta",
            stacklevel=3,
        )


def warn_of_ratios(config: Any, objective: Objective, name: str) -> None:
    """Warn, in the log in which TRL does, of arguments about importance ratios that do not say what
    the objective does, or say what its paper does not mean.
    """
    loss_type = config.loss_type
    label = type(objective).__name__
    advice = ""
    if per_sequence(config) and loss_type in TOKEN_SUMS and label == "GSPO":
        advice = (
            f"{BY_LENGTH.format(loss_type)} in TRL's own loss; GSPO counts every completion alike, "
            f"as in its paper: set loss_type='grpo', or use an objective with ratio='sequence'"
        )
    elif per_sequence(config) and loss_type in TOKEN_SUMS and has_one_ratio(objective):
        advice = (
            f"{BY_LENGTH.format(loss_type)}, and so does {label}(ratio='sequence'); in GSPO, with "
            "loss_type='grpo', every completion counts alike"
        )
    elif per_sequence(config) and label == "VESPO":
        advice = (
            "importance_sampling_level='sequence' changes nothing with loss_type='vespo', whose "
            "weights are of whole completions anyway; leave it out"
        )
    elif loss_type == "luspo" and label == "LUSPO" and not per_sequence(config):
        advice = (
            "LUSPO has one importance ratio for each completion, as in its paper; with "
            "loss_type='luspo' importance_sampling_level='sequence' says so"
        )
    if advice and config.process_index == 0:
        logging.getLogger(TRL_LOG).warning("%s: %s", name, advice)


def advantage_rule(objective: Objective, size: int) -> tuple[str, float]:
    """How the objective's advantages follow from TRL's, for groups of `size`: the value of
    `scale_rewards` to ask TRL for, and a factor.

    TRL's are the reward minus the group's mean ("none"), divided by the group's standard deviation
    ("group"); a leave-one-out baseline is size / (size - 1) times the former. ConfigError where the
    objective's `credit` is neither. The rule is found by giving `credit` made-up rewards.
    """
    name = type(objective).__name__
    fields = type(objective).model_fields
    scores = torch.arange(size) ** 2.0 * torch.tensor([[1.0], [-3.0]])  # two groups, two spreads
    own = _credited(objective, scores)

    # The same groups beside others, with a KL to the reference and different lengths: their
    # advantages must not change.
    others = torch.stack([torch.zeros(size), 10.0 * torch.arange(size)])
    beside_others = _credited(objective, torch.cat([scores, others]), apart=True)[:2]
    if not torch.allclose(beside_others[..., 0], own[..., 0], rtol=1e-4, atol=1e-5):
        settings = {"kl_credit": "kl_credit='token'", "drop_constant": "drop_constant=False"}
        hint = "".join(f"set {value}, or " for field, value in settings.items() if field in fields)
        raise ConfigError(
            f"as_trl_trainer: {name}'s advantages depend on more than the rewards of a prompt's "
            "completions (the KL to the reference, lengths or other prompts), TRL's do not; "
            f"{hint}use `alignkit train`"
        )

    centred = scores - scores.mean(1, keepdim=True)
    rules = {"none": centred, "group": centred / (scores.std(1, keepdim=True) + 1e-4)}
    for rule, theirs in rules.items():
        factor = float((own.mean(-1) * theirs).sum() / (theirs**2).sum())
        if torch.allclose(own, factor * theirs.unsqueeze(-1), rtol=1e-4, atol=1e-4):
            return rule, factor

    hint = "set baseline='leave_one_out' or 'mean', or use" if "baseline" in fields else "use"
    raise ConfigError(
        f"as_trl_trainer: {name}'s advantages are not rewards minus their group's mean, "
        f"as TRL's are; {hint} `alignkit train`"
    )


def _credited(objective: Objective, scores: torch.Tensor, *, apart: bool = False) -> torch.Tensor:
    """The objective's advantages [groups, size, 2 tokens] for
    made-up completions with `scores` [groups, size].

    `apart`: the reference differs from the policy, and every other completion has one token only.
    """
    groups, size = scores.shape
    n = scores.numel()
    gap = torch.arange(2.0 * n).view(n, 2) * apart
    mask = torch.ones(n, 2, dtype=torch.bool)
    mask[::2, 1] = not apart
    extras = {"entropy": torch.ones(n, 2), **dict.fromkeys(objective.plan.statistics, gap)}
    tokens = TokenLogps(torch.zeros(n, 2), {"reference": gap}, mask, torch.zeros(n, 2), extras)

    rollout = RolloutBatch(tokens, scores.flatten(), torch.arange(n) // size)
    credited, _ = objective.credit(rollout, objective.init_state())
    if credited.advantages is None:
        name = type(objective).__name__
        raise ConfigError(
            f"as_trl_trainer: {name}.credit fills no advantages; "
            "it should return replace(rollout, advantages=...)"
        )
    return credited.advantages.view(groups, size, 2)


def checked_arguments(config: Any, objective: Objective, name: str, loss_type: str) -> Any:
    """A copy of the trainer's arguments in which beta, loss type
    and reward scaling are the objective's.

    ConfigError for an argument that says something else, and for arguments of TRL's own losses.
    """
    config = copy.copy(config)
    label = type(objective).__name__
    own_beta = getattr(objective, "beta", None)
    default_beta = default_of(config, "beta")
    if config.beta not in (default_beta, own_beta):
        has = f"{label}'s is {own_beta}" if own_beta is not None else f"{label} has none"
        raise ConfigError(
            f"{name}: args.beta is {config.beta}, {has}; "
            "leave it out of the arguments, the objective decides"
        )
    # With beta 0 TRL loads no reference for rollouts.
    config.beta = (own_beta or default_beta or 1.0) if wants_reference(objective) else 0.0

    if getattr(config, "use_liger_kernel", False):
        raise ConfigError(
            f"{name}: use_liger_kernel=True replaces the model's forward, which then gives no "
            "logits; set it to False"
        )

    changed = [
        field
        for field in OWN_LOSS
        if hasattr(config, field) and getattr(config, field) != default_of(config, field)
    ]
    loss_types = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type]
    if loss_types != [loss_type] and config.loss_type != default_of(config, "loss_type"):
        changed.append("loss_type")
    changed = [field for field in changed if not says_the_same(field, config, objective)]
    if changed:
        settings = ", ".join(f"{field}={getattr(config, field)!r}" for field in changed)
        hints = "; ".join(instead(field, config) for field in changed)
        raise ConfigError(
            f"{name}: {settings} would change nothing, the loss is {label}'s; "
            f"leave it out of the arguments; {hints}"
        )
    config.loss_type = [loss_type] if isinstance(config.loss_type, list) else loss_type
    return config


def checked_pair_arguments(config: Any, objective: Objective, name: str) -> Any:
    """The arguments, where each batch brings what the objective reads; else ConfigError."""
    by_token = wants_reference(objective) and not reads_reference_sums(objective)
    if config.precompute_ref_log_probs and by_token:
        raise ConfigError(
            f"{name}: precompute_ref_log_probs=True keeps one sum per completion, and the "
            "objective reads the reference token by token; set it to False"
        )

    apart = config.gradient_accumulation_steps > 1 or config.world_size > 1
    if objective.plan.coupled and apart:
        raise ConfigError(
            f"{name}: {type(objective).__name__} compares all pairs of an optimiser step with one "
            "another, and TRL gives one micro-batch of one process at a time; set "
            "gradient_accumulation_steps=1 with a larger per_device_train_batch_size and run one "
            "process, or use `alignkit train`"
        )
    return config


def checked_rollout_arguments(
    config: Any, objective: Objective, name: str
) -> tuple[Any, dict[str, float]]:
    """The arguments with the objective's reward scaling, and the factor of TRL's advantages in
    training and evaluation.
    """
    label = type(objective).__name__
    scale, factor = advantage_rule(objective, config.num_generations)
    if config.scale_rewards not in (scale, default_of(config, "scale_rewards")):
        raise ConfigError(
            f"{name}: args.scale_rewards is {config.scale_rewards!r}, {label}'s advantages are "
            f"those of {scale!r}; leave it out of the arguments, the objective decides"
        )

    aggregation = getattr(config, "multi_objective_aggregation", "sum_then_normalize")
    if aggregation != "sum_then_normalize":
        raise ConfigError(
            f"{name}: multi_objective_aggregation={aggregation!r} makes other advantages than "
            f"{label}'s, which are those of the rewards' sum; leave it out, or use TRL's own "
            "trainer for it"
        )
    if config.use_vllm and config.vllm_importance_sampling_correction:
        raise ConfigError(
            f"{name}: vllm_importance_sampling_correction=True weighs TRL's own loss; "
            "set it to False"
        )

    config.scale_rewards = scale
    evaluation = getattr(config, "num_generations_eval", None) or config.num_generations
    # The only completion of a prompt is its group's mean: the advantage is 0, whatever the factor.
    factors = {"train": factor, "eval": 0.0}
    if evaluation > 1:
        factors["eval"] = advantage_rule(objective, evaluation)[1]
    return config, factors


def default_of(config: Any, field: str) -> Any:
    """The default of a dataclass's field."""
    declared = type(config).__dataclass_fields__[field]
    if declared.default is not MISSING:
        return declared.default
    return declared.default_factory()


def wants_reference(objective: Objective) -> bool:
    """Whether its loss reads the reference."""
    return "reference" in objective.plan.anchors


def reads_reference_sums(objective: Objective) -> bool:
    """Whether the loss stays the same when only each completion's
    sum of the reference's log-probs is known.
    """
    if objective.plan.read_by_statistics:
        return False

    # The loss of a made-up pair, once with the reference token by token and once with its sums,
    # which are put on the first token.
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(2, 2, 3, generator=generator)
    reference = -torch.rand(2, 2, 3, generator=generator)
    sums = torch.nn.functional.pad(reference.sum(-1, keepdim=True), (0, 2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    names = ["entropy", *objective.plan.statistics]

    def terms(anchor: torch.Tensor) -> Sequence[Term]:
        chosen, rejected = (
            TokenLogps(logps, {"reference": known}, mask, extras=dict.fromkeys(names, -logps))
            for logps, known in zip(policy, anchor)
        )
        return objective.loss(PairBatch(chosen, rejected)).terms

    return all(
        torch.allclose(by_token.values.sum(), by_sum.values.sum(), rtol=1e-4)
        for by_token, by_sum in zip(terms(reference), terms(sums))
    )
