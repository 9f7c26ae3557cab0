"""The data of a run: rows or prompts of a recipe as the loop's source, held-out rows, and the
prompts that `samples.jsonl` shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from torch import Tensor

from alignkit.batches import FAMILIES, Bundle, Draw
from alignkit.config.data import DataConfig
from alignkit.data.load import (
    fingerprint,
    load_bundles,
    load_held_out,
    load_mixture,
    load_prompts,
)
from alignkit.data.mixture import Mixture
from alignkit.data.prompts import Prompt
from alignkit.data.prompts import fingerprint as prompts_fingerprint
from alignkit.data.read import Source as RowsSource
from alignkit.data.report import Report
from alignkit.judges.load import load_judge
from alignkit.policies.gradient_norms import head_gradient_norms
from alignkit.policies.module import context_length
from alignkit.policies.pair import PolicyPair
from alignkit.rewards.call import RewardCall
from alignkit.rewards.load import load_rewards
from alignkit.rollout.engines import make_sampler
from alignkit.rollout.environment_pool import Environments
from alignkit.rollout.importance import Correction
from alignkit.rollout.policy_copy import PolicyCopy
from alignkit.rollout.protocol import Models
from alignkit.rollout.text import as_reply, decode
from alignkit.runs.agents import environments_of, shown_episodes, turn_sampler
from alignkit.runs.context import RunContext
from alignkit.runs.row_ends import check_row_ends
from alignkit.runs.row_lengths import check_prompt_lengths, check_row_lengths
from alignkit.runs.scored_rows import scored, scored_where_visited
from alignkit.runs.teacher import asking_teacher
from alignkit.sources.base import Source
from alignkit.sources.budgets import Allocation
from alignkit.sources.dataset import DatasetSource, order_of
from alignkit.sources.rollouts import RolloutSource
from alignkit.sources.sampled_pairs import SampledPairs
from alignkit.sources.scoring import Scoring
from alignkit.training.held_out_reward import HeldOut, at_once
from alignkit.training.held_out_sets import measured_on
from alignkit.training.reduction import Metrics

SHOWN_PROMPTS = 4  # in samples.jsonl, at each step that writes them

SampleRows = Callable[[int], list[dict[str, Any]]]  # step -> rows of samples.jsonl


@dataclass(frozen=True)
class JobData:
    """The data side of a job."""

    source: Source
    rows: int  # pairs, demonstrations or prompts of one epoch
    format: str  # of the rows
    identity: Mapping[str, Any]  # what a checkpoint must match
    notes: Sequence[str]  # the data report
    samples: SampleRows
    # Name -> this rank's held-out bundles.
    evaluation: Mapping[str, Sequence[Bundle]] | None = None
    measure: Callable[[], Metrics] | None = None  # further held-out metrics, over all ranks
    observe: Callable[[Metrics], None] | None = None  # told of every evaluation


def fixed_data(context: RunContext) -> JobData:
    """Demonstrations, pairs or labelled completions from a file, a data set or a task."""
    recipe = context.recipe
    plan = context.plan
    pair = context.pair

    def load(config: DataConfig, source: RowsSource) -> tuple[Sequence[Bundle], Report]:
        bundles, report = load_bundles(config, plan.data, pair.tokenizer, source=source)
        if plan.rewards:
            check_row_ends(bundles, pair.tokenizer, config, report)
        return bundles, report

    mixture = load_mixture(recipe.data, load, context.training_rows)
    bundles = mixture.rows
    identity = {"rows": fingerprint(bundles), **mixture.identity()}
    notes = mixture.lines()
    for part in mixture.parts:
        notes += check_row_lengths(context, part.rows, part.report.source)

    held_out, about_held_out = held_out_of(context, load, check_row_lengths, bundles)
    notes += about_held_out

    order = order_of(mixture, recipe.train.seed)
    with asking_teacher(context):
        bundles = scored_where_visited(context, bundles, order)
        sets = {name: scored(context, rows) for name, rows in held_out.items()}

    dataset = DatasetSource(
        bundles,
        plan,
        recipe.train.batch_size,
        seed=recipe.train.seed,
        rank=context.rank,
        world=context.processes,
        order=order,
    )
    sampled = _with_samples(context, dataset, len(bundles)) if plan.samples else None
    return JobData(
        source=sampled or dataset,
        observe=None if sampled is None else sampled.evaluated,
        rows=len(bundles),
        format=mixture.format,
        identity=identity,
        notes=notes,
        samples=_shown_samples(context, _first_prompts(next(iter(sets.values()), bundles))),
        evaluation=shares_of(context, sets),
    )


def held_out_of(
    context: RunContext,
    load: Callable[[DataConfig, RowsSource], tuple[Sequence[Any], Report]],
    fits: Callable[[RunContext, Sequence[Any], str], list[str]],
    training: Sequence[Any],
) -> tuple[dict[str, Sequence[Any]], list[str]]:
    """Name -> rows of every held-out set, which `load` reads and `fits` checks, and notes on them."""
    return load_held_out(
        context.recipe.data,
        load,
        context.held_out_rows,
        fits=partial(fits, context),
        training=training,
        stream=context.stream,
    )


def shares_of(
    context: RunContext, sets: Mapping[str, Sequence[Bundle]]
) -> dict[str, Sequence[Bundle]] | None:
    """This rank's part of every held-out set; None where there are none."""
    return {name: rows[context.rank :: context.processes] for name, rows in sets.items()} or None


def sampled_data(context: RunContext) -> JobData:
    """Prompts that the policy answers during the run, with the recipe's rewards or judge (or those
    of the task).
    """
    recipe = context.recipe

    def load(config: DataConfig, source: RowsSource) -> tuple[Sequence[Prompt], Report]:
        return load_prompts(config, context.pair.tokenizer, source=source)

    mixture = load_mixture(recipe.data, load, context.training_rows)
    prompts = mixture.rows
    for part in mixture.parts:
        check_prompt_lengths(context, part.rows, part.report.source)
    notes = mixture.lines()
    if recipe.rollout.truncation:
        notes.append(
            f"completions are drawn with {', '.join(recipe.rollout.truncation)}, and their tokens "
            "weigh by the sampler's renormalised log-probs; the KL that is trained and logged is "
            "that of the full distribution"
        )
    reward = _reward(context)
    environments = environments_of(context)
    source = _rollouts(context, mixture, reward, _judge(context), environments)

    measures = {}
    if recipe.data.eval and (reward or environments):
        held_out, about_held_out = held_out_of(context, load, check_prompt_lengths, prompts)
        notes += about_held_out
        wait = source.drawing.wait if source.drawing is not None else at_once
        measures = _held_out(context, held_out, reward, environments, wait)
    elif recipe.data.eval:
        notes.append(
            "data.eval is not used: held-out prompts are measured by a reward, "
            "and this run has none"
        )

    shown = prompts[:SHOWN_PROMPTS]
    samples = (
        _shown_samples(context, [prompt.ids for prompt in shown])
        if environments is None
        else shown_episodes(context, environments, shown)
    )
    every_prompt = repr([prompt.ids.tolist() for prompt in prompts])
    return JobData(
        source=source,
        rows=len(prompts),
        format=mixture.format,
        identity={
            **mixture.identity(),
            "rows": sha256(every_prompt.encode()).hexdigest(),
            "prompts": prompts_fingerprint(prompts),
        },
        notes=notes,
        samples=samples,
        measure=measured_on(measures),
    )


def _rollouts(
    context: RunContext,
    mixture: Mixture[Prompt],
    reward: RewardCall | None,
    judge: Callable[..., Any] | None,
    environments: Environments | None,
) -> RolloutSource:
    """The source that samples the prompts' completions and has them scored or judged."""
    recipe = context.recipe
    rollout = recipe.rollout

    # Another engine's log-probs differ a little from the trainer's own, older weights' by more.
    correction = None
    if rollout.engine == "vllm":
        correction = Correction(rollout.max_importance, rollout.max_mismatch)
    elif rollout.ahead:
        correction = Correction(rollout.max_importance)

    models: Models = context.pair
    if rollout.ahead and rollout.engine == "hf":
        models = PolicyCopy(context.pair)

    sampler = make_sampler(
        rollout,
        models,
        seed=recipe.train.seed,
        temperature=context.pair.base.temperature,
        truncates=FAMILIES[context.plan.data].credited,
        accelerator=context.accelerator,
    )
    turns = None
    if environments is not None:
        turns = turn_sampler(context, environments, sampler, mixture.rows, recipe.train.seed)
    return RolloutSource(
        mixture.rows,
        context.objective,
        context.pair,
        sampler,
        Scoring(context.plan, _reply(context), reward, judge),
        context.accelerator,
        batch_size=recipe.train.batch_size,
        completions=rollout.completions,
        seed=recipe.train.seed,
        micro_batch_tokens=int(recipe.train.micro_batch_tokens),
        pass_rate=rollout.pass_rate if context.plan.feedback == "reward" else None,
        refills=rollout.refills,
        allocation=_allocation(context),
        mask_truncated=rollout.mask_truncated and FAMILIES[context.plan.data].credited,
        turns=turns,
        correction=correction,
        ahead=rollout.ahead,
        visits=order_of(mixture, recipe.train.seed),
    )


def _allocation(context: RunContext) -> Allocation | None:
    """How the prompts get numbers of completions of their own; None: all have as many."""
    rollout = context.recipe.rollout
    if rollout.allocate is None:
        return None
    norms = None
    if rollout.allocate.norm == "head":
        budget = int(context.recipe.train.micro_batch_tokens)
        norms = partial(head_gradient_norms, context.pair, budget=budget)
    return Allocation(rollout.allocate, rollout.completions, rollout.max_new_tokens, norms)


def _held_out(
    context: RunContext,
    held_out: Mapping[str, Sequence[Prompt]],
    reward: RewardCall | None,
    environments: Environments | None,
    wait: Callable[[], None],
) -> dict[str, HeldOut]:
    """The mean reward on the prompts of each set of `data.eval`, under noise that training does not
    see.
    """
    recipe = context.recipe
    seed = recipe.train.seed + 1
    sampler = make_sampler(
        recipe.rollout,
        context.pair,
        seed=seed,
        temperature=context.pair.base.temperature,
        truncates=True,
        accelerator=context.accelerator,
    )
    scoring = Scoring(context.plan, _reply(context), reward)

    measures = {}
    for name, prompts in held_out.items():
        turns = None
        if environments is not None:
            turns = turn_sampler(context, environments, sampler, prompts, seed)
        measures[name] = HeldOut(
            prompts, sampler, scoring, context.accelerator, turns=turns, wait=wait
        )
    return measures


def _reply(context: RunContext) -> Callable[[Prompt, Tensor], Any]:
    """(prompt, ids) -> what rewards and judges read: a text, or the messages that continue a chat."""

    def reply(prompt: Prompt, ids: Tensor) -> Any:
        return as_reply(prompt.text, decode(context.pair.tokenizer, ids))

    return reply


def _reward(context: RunContext) -> RewardCall | None:
    """The recipe's rewards, else the task's own; None where the objective learns from no scores."""
    if context.plan.feedback != "reward":
        return None
    if context.recipe.rewards:
        return load_rewards(
            context.recipe.rewards,
            safe=context.safe,
            device=context.accelerator.device,
            template_time=context.recipe.data.template_time,
        )
    return context.task.reward if context.task else None


def _judge(context: RunContext) -> Callable[..., Any] | None:
    """The recipe's judge, else the task's own; None where the objective learns from no verdicts."""
    if context.plan.feedback in ("none", "reward"):
        return None
    if context.recipe.judge:
        return load_judge(
            context.recipe.judge,
            safe=context.safe,
            device=context.accelerator.device,
            template_time=context.recipe.data.template_time,
        )
    return context.task.judge if context.task else None


def _first_prompts(bundles: Sequence[Bundle]) -> list[Tensor]:
    """The first few prompts that differ."""
    prompts: dict[tuple[int, ...], Tensor] = {}
    for bundle in bundles:
        prompts.setdefault(tuple(bundle.prompt.tolist()), bundle.prompt)
        if len(prompts) == SHOWN_PROMPTS:
            break
    return list(prompts.values())


def _with_samples(context: RunContext, dataset: DatasetSource, rows: int) -> SampledPairs:
    """The rows, so many of them, with the completions that the plan draws beside them in every step."""
    recipe = context.recipe
    return SampledPairs(
        dataset,
        make_sampler(recipe.rollout, context.pair, seed=recipe.train.seed),
        context.plan,
        recipe.rollout.completions,
        context.accelerator,
        _judge(context),
        partial(decode, context.pair.tokenizer),
        steps=context.steps(rows),
        watched=recipe.train.metric,
    )


def _shown_samples(context: RunContext, prompts: list[Tensor]) -> SampleRows:
    """step -> rows for samples.jsonl: the same prompts and the same noise each time, so that only
    the policy differs.
    """
    pair: PolicyPair = context.pair
    rollout = context.recipe.rollout

    # Prompts that leave no room for an answer are not shown; the others get equal room.
    with pair.model("policy") as model:
        context_size = context_length(model)
    prompts = [ids for ids in prompts if len(ids) < context_size]
    room = min([rollout.max_new_tokens, *(context_size - len(ids) for ids in prompts)])

    settings = rollout.model_copy(update={"max_new_tokens": room, "engine": "hf"})
    sampler = make_sampler(settings, pair, seed=context.recipe.train.seed, exact=False)

    def samples(step: int) -> list[dict[str, Any]]:
        rows = []
        drawn = sampler.sample(prompts, Draw(1), step=0, prompt_ids=range(len(prompts)))
        for ids, (sample,) in zip(prompts, drawn):
            prompt = decode(pair.tokenizer, ids)
            completion = decode(pair.tokenizer, sample.ids)
            rows.append({"step": step, "prompt": prompt, "completion": completion})
        return rows

    return samples
