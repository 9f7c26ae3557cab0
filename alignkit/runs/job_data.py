"""The data of a run: rows or prompts of a recipe as the loop's source, held-out rows, and the
prompts that `samples.jsonl` shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import FAMILIES, Bundle, Draw
from alignkit.data.load import check_held_out, fingerprint, load_bundles, load_prompts
from alignkit.data.prompts import Prompt
from alignkit.data.prompts import fingerprint as prompts_fingerprint
from alignkit.data.report import Report
from alignkit.errors import ConfigError
from alignkit.judges.load import load_judge
from alignkit.policies.lazy import changed
from alignkit.policies.module import context_length
from alignkit.policies.pair import PolicyPair
from alignkit.policies.store import cached_in
from alignkit.policies.teacher_store import with_stored_teacher
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
from alignkit.runs.row_lengths import check_prompt_lengths, check_row_lengths
from alignkit.sources.base import Source
from alignkit.sources.dataset import DatasetSource
from alignkit.sources.rollouts import RolloutSource
from alignkit.sources.sampled_pairs import SampledPairs
from alignkit.sources.scoring import Scoring
from alignkit.training.held_out_reward import HeldOut
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
    evaluation: Sequence[Bundle] | None = None  # this rank's held-out bundles
    measure: Callable[[], Metrics] | None = None  # further held-out metrics, over all ranks


def fixed_data(context: RunContext) -> JobData:
    """Demonstrations, pairs or labelled completions from a file, a data set or a task."""
    recipe = context.recipe
    plan = context.plan
    pair = context.pair

    bundles, report = load_bundles(
        recipe.data, plan.data, pair.tokenizer, source=context.rows("train")
    )
    identity = {"rows": fingerprint(bundles)}
    notes = [*report.lines(), *check_row_lengths(context, bundles, report.source)]

    held_out: Sequence[Bundle] = []
    if recipe.data.eval:
        held_out, held_out_report = load_bundles(
            recipe.data, plan.data, pair.tokenizer, source=context.rows("eval")
        )
        notes = [*notes, *held_out_report.lines()]
        notes += check_row_lengths(context, held_out, held_out_report.source)
        if context.task is None:
            notes += check_held_out(bundles, held_out, held_out_report.source)

    if pair.reference_kind == "cached":
        bundles = _with_reference(context, bundles)
        held_out = _with_reference(context, held_out)
    bundles = _with_teacher(context, bundles)
    held_out = _with_teacher(context, held_out)
    for name, text in plan.prefixes.items():
        bundles = _with_prefixed_reference(context, bundles, name, text)
        held_out = _with_prefixed_reference(context, held_out, name, text)

    dataset = DatasetSource(
        bundles,
        plan,
        recipe.train.batch_size,
        seed=recipe.train.seed,
        rank=context.rank,
        world=context.processes,
    )
    return JobData(
        source=_with_samples(context, dataset) if plan.samples else dataset,
        rows=len(bundles),
        format=report.format,
        identity=identity,
        notes=notes,
        samples=_shown_samples(context, _first_prompts(held_out or bundles)),
        evaluation=held_out[context.rank :: context.processes] if recipe.data.eval else None,
    )


def sampled_data(context: RunContext) -> JobData:
    """Prompts that the policy answers during the run, with the recipe's rewards or judge (or those
    of the task).
    """
    recipe = context.recipe
    prompts, report = load_prompts(
        recipe.data, context.pair.tokenizer, source=context.rows("train")
    )
    check_prompt_lengths(context, prompts, report.source)
    notes = report.lines()
    if recipe.rollout.truncation:
        notes.append(
            f"completions are drawn with {', '.join(recipe.rollout.truncation)}, and their tokens "
            "weigh by the sampler's renormalised log-probs; the KL that is trained and logged is "
            "that of the full distribution"
        )
    reward = _reward(context)
    environments = environments_of(context)
    source = _rollouts(context, prompts, reward, _judge(context), environments)

    measure = None
    if recipe.data.eval and (reward or environments):
        measure, held_out_report = _held_out(context, reward, environments)
        if source.drawing is not None:
            measure = replace(measure, wait=source.drawing.wait)
        notes = [*notes, *held_out_report.lines()]
        check_prompt_lengths(context, measure.prompts, held_out_report.source)
        if context.task is None:
            notes += check_held_out(prompts, measure.prompts, held_out_report.source)
    elif recipe.data.eval:
        unused = (
            "data.eval is not used: held-out prompts are measured by a reward, "
            "and this run has none"
        )
        notes = [*notes, unused]

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
        format=report.format,
        identity={
            "rows": sha256(every_prompt.encode()).hexdigest(),
            "prompts": prompts_fingerprint(prompts),
        },
        notes=notes,
        samples=samples,
        measure=measure,
    )


def _rollouts(
    context: RunContext,
    prompts: Sequence[Prompt],
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
        turns = turn_sampler(context, environments, sampler, prompts, recipe.train.seed)
    return RolloutSource(
        prompts,
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
        mask_truncated=rollout.mask_truncated and FAMILIES[context.plan.data].credited,
        turns=turns,
        correction=correction,
        ahead=rollout.ahead,
    )


def _held_out(
    context: RunContext, reward: RewardCall | None, environments: Environments | None
) -> tuple[HeldOut, Report]:
    """The mean reward on the prompts of `data.eval`, under noise that training does not see."""
    recipe = context.recipe
    prompts, report = load_prompts(recipe.data, context.pair.tokenizer, source=context.rows("eval"))
    sampler = make_sampler(
        recipe.rollout,
        context.pair,
        seed=recipe.train.seed + 1,
        temperature=context.pair.base.temperature,
        truncates=True,
        accelerator=context.accelerator,
    )
    turns = None
    if environments is not None:
        turns = turn_sampler(context, environments, sampler, prompts, recipe.train.seed + 1)
    scoring = Scoring(context.plan, _reply(context), reward)
    return HeldOut(prompts, sampler, scoring, context.accelerator, turns=turns), report


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
        device = context.accelerator.device
        return load_rewards(context.recipe.rewards, safe=context.safe, device=device)
    return context.task.reward if context.task else None


def _judge(context: RunContext) -> Callable[..., Any] | None:
    """The recipe's judge, else the task's own; None where the objective learns from no verdicts."""
    if context.plan.feedback in ("none", "reward"):
        return None
    if context.recipe.judge:
        device = context.accelerator.device
        return load_judge(context.recipe.judge, safe=context.safe, device=device)
    return context.task.judge if context.task else None


def _first_prompts(bundles: Sequence[Bundle]) -> list[Tensor]:
    """The first few prompts that differ."""
    prompts: dict[tuple[int, ...], Tensor] = {}
    for bundle in bundles:
        prompts.setdefault(tuple(bundle.prompt.tolist()), bundle.prompt)
        if len(prompts) == SHOWN_PROMPTS:
            break
    return list(prompts.values())


def _with_samples(context: RunContext, dataset: DatasetSource) -> SampledPairs:
    """The rows with the completions that the plan draws beside them in every step."""
    recipe = context.recipe
    return SampledPairs(
        dataset,
        make_sampler(recipe.rollout, context.pair, seed=recipe.train.seed),
        context.plan,
        recipe.rollout.completions,
        context.accelerator,
        _judge(context),
        partial(decode, context.pair.tokenizer),
    )


def _with_reference(context: RunContext, bundles: Sequence[Bundle]) -> Sequence[Bundle]:
    """The bundles with the reference's log-probs of their tokens.

    Each rank scores its share, or reads it from `reference.store`; the shares are then exchanged.
    """
    rank = context.rank
    processes = context.processes
    store = context.recipe.reference.store

    share = bundles[rank::processes]
    # A process without a share takes part where the model is spread over all.
    takes_part = bool(share) or context.pair.shards is not None
    if takes_part and store:
        share = cached_in(Path(store).expanduser(), context.pair, share, context.plan)
    elif takes_part:
        share = context.pair.cached(share, context.plan)
    if processes == 1:
        return share

    # Rank r scored the bundles at places r, r + processes, r + 2 * processes, ...
    reference: dict[int, list[Tensor]] = {}
    shares = gather_object([[bundle.tokens["reference"] for bundle in share]])
    for first, logps in enumerate(shares):
        reference |= dict(zip(range(first, len(bundles), processes), logps))

    def with_reference(place: int, bundle: Bundle) -> Bundle:
        return replace(bundle, tokens={**bundle.tokens, "reference": reference[place]})

    return changed(bundles, with_reference)


def _with_teacher(context: RunContext, bundles: Sequence[Bundle]) -> Sequence[Bundle]:
    """The bundles with the teacher's most likely tokens, where the recipe asks for that. Every
    process scores all of them, unless a store has them.
    """
    teacher = context.recipe.teacher
    if teacher is None or teacher.top is None or not context.plan.needs_teacher or not bundles:
        return bundles
    folder = Path(teacher.store).expanduser() if teacher.store else None
    return with_stored_teacher(context.pair, bundles, teacher.top, folder)


def _with_prefixed_reference(
    context: RunContext, bundles: Sequence[Bundle], name: str, text: str
) -> Sequence[Bundle]:
    """The bundles with tokens[name]: the reference's log-probs where `text` stands before the
    prompt, behind a start token if there is one.
    """
    tokenizer = context.pair.tokenizer
    prefix = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    if not len(prefix):
        raise ConfigError(
            f"objective.{name}: the tokenizer makes no token of {text!r}; give a text"
        )

    prefixed = []
    for bundle in bundles:
        has_start = (
            tokenizer.bos_token_id is not None and bundle.prompt[0] == tokenizer.bos_token_id
        )
        first = int(has_start)
        prompt = torch.cat([bundle.prompt[:first], prefix, bundle.prompt[first:]])
        prefixed.append(replace(bundle, prompt=prompt, tokens={}))

    scored = _with_reference(context, prefixed)
    return [
        replace(bundle, tokens={**bundle.tokens, name: other.tokens["reference"]})
        for bundle, other in zip(bundles, scored)
    ]


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
