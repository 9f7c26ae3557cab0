"""What a run is fed with: rows or prompts of a recipe as the loop's source, held-out bundles and
samples to read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import Bundle, Draw, Plan
from alignkit.config.recipe import Recipe
from alignkit.data.load import Prompt, fingerprint, load_bundles, load_prompts
from alignkit.data.report import Report
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective
from alignkit.policies.module import context_length
from alignkit.policies.pair import PolicyPair
from alignkit.policies.store import cached_in
from alignkit.rollout.engines import make_sampler
from alignkit.rollout.importance import Correction
from alignkit.rollout.text import as_reply, decode
from alignkit.sources.dataset import DatasetSource, Source
from alignkit.sources.sampled_pairs import SamplesBeside
from alignkit.tasks import Task
from alignkit.training.held_out_reward import HeldOut
from alignkit.training.reduction import Metrics

SHOWN_PROMPTS = 4


@dataclass(frozen=True)
class Feed:
    """The data side of a job."""

    source: Source
    rows: int  # pairs, demonstrations or prompts of one epoch
    format: str  # of the rows
    identity: Mapping[str, Any]  # what a checkpoint must match
    notes: Sequence[str]  # the data report
    samples: Callable[[int], list[dict[str, Any]]]
    evaluation: Sequence[Bundle] | None = None  # of this rank
    measure: Callable[[], Metrics] | None = None


def fixed_feed(
    recipe: Recipe,
    objective: Objective,
    task: Task | None,
    pair: PolicyPair,
    accelerator: Accelerator,
    safe: bool,
) -> Feed:
    """Demonstrations, pairs or labelled completions from a file, a data set or a task."""
    plan = objective.plan
    rank = accelerator.process_index
    world = accelerator.num_processes
    bundles, report = _load(load_bundles, recipe, plan, pair, task, "train")
    identity = {"rows": fingerprint(bundles)}
    held_out: list[Bundle] = []
    notes = report.lines()
    if recipe.data.eval:
        held_out, other = _load(load_bundles, recipe, plan, pair, task, "eval")
        notes = [*notes, *other.lines()]
    if pair.reference_kind == "cached":
        bundles, held_out = (
            _scored(part, recipe, plan, pair, accelerator) for part in (bundles, held_out)
        )
    for name, text in plan.prefixes.items():
        bundles, held_out = (
            _after(text, name, part, recipe, plan, pair, accelerator)
            for part in (bundles, held_out)
        )
    rows = DatasetSource(
        bundles, plan, recipe.train.batch_size, seed=recipe.train.seed, rank=rank, world=world
    )
    source: Source = rows
    if plan.samples:
        sampler = make_sampler(recipe.rollout, pair, seed=recipe.train.seed)
        judge = _appraisers(recipe, plan, task, accelerator, safe)[1]
        source = SamplesBeside(
            rows,
            sampler,
            plan,
            recipe.rollout.completions,
            accelerator,
            judge,
            partial(decode, pair.tokenizer),
        )
    texts = {tuple(b.prompt.tolist()): b.prompt for b in held_out or bundles}
    samples = _sampling(recipe, pair, list(texts.values())[:SHOWN_PROMPTS])
    return Feed(
        source,
        len(bundles),
        report.format,
        identity,
        notes,
        samples,
        held_out[rank::world] if recipe.data.eval else None,
    )


def sampled_feed(
    recipe: Recipe,
    objective: Objective,
    task: Task | None,
    pair: PolicyPair,
    accelerator: Accelerator,
    safe: bool,
) -> Feed:
    """Prompts that the policy answers during the run, with the recipe's rewards or judge (a task
    brings its own reward).
    """
    from alignkit.sources.rollouts import RolloutSource

    plan = objective.plan
    rollout = recipe.rollout
    prompts, report = _load(load_prompts, recipe, plan, pair, task, "train")
    reward, judge = _appraisers(recipe, plan, task, accelerator, safe)

    def reply(prompt: Prompt, ids: Tensor) -> Any:
        return as_reply(prompt.text, decode(pair.tokenizer, ids))

    source = RolloutSource(
        prompts,
        objective,
        pair,
        make_sampler(rollout, pair, seed=recipe.train.seed, accelerator=accelerator),
        reply,
        accelerator,
        batch_size=recipe.train.batch_size,
        completions=rollout.completions,
        seed=recipe.train.seed,
        reward=reward,
        judge=judge,
        micro_batch_tokens=int(recipe.train.micro_batch_tokens),
        pass_rate=rollout.pass_rate if plan.feedback == "reward" else None,
        refills=rollout.refills,
        correction=Correction(rollout.max_importance, rollout.max_mismatch)
        if rollout.engine == "vllm"
        else None,
    )
    measure = None
    notes = report.lines()
    if recipe.data.eval and reward:
        held_out, other = _load(load_prompts, recipe, plan, pair, task, "eval")
        sampler = make_sampler(rollout, pair, seed=recipe.train.seed + 1, accelerator=accelerator)
        measure = HeldOut(held_out, sampler, reply, reward, accelerator)
        notes = [*notes, *other.lines()]
    elif recipe.data.eval:
        notes = [
            *notes,
            "data.eval is not used: held-out prompts are measured by a reward, and this run has none",
        ]
    identity = {"rows": sha256(repr([p.ids.tolist() for p in prompts]).encode()).hexdigest()}
    samples = _sampling(recipe, pair, [p.ids for p in prompts[:SHOWN_PROMPTS]])
    return Feed(source, len(prompts), report.format, identity, notes, samples, measure=measure)


def _appraisers(
    recipe: Recipe, plan: Plan, task: Task | None, accelerator: Accelerator, safe: bool
) -> tuple[Any, Any]:
    """The reward or the judge that the objective asks for: the recipe's, else the task's own."""
    if plan.feedback == "reward":
        from alignkit.rewards import load_rewards

        return load_rewards(
            recipe.rewards, safe=safe, device=accelerator.device
        ) if recipe.rewards else task and task.reward, None
    if plan.feedback == "none":
        return None, None
    from alignkit.judges import load_judge

    return None, load_judge(
        recipe.judge, safe=safe, device=accelerator.device
    ) if recipe.judge else task and task.judge


def _load(
    load: Callable[..., Any],
    recipe: Recipe,
    plan: Plan,
    pair: PolicyPair,
    task: Task | None,
    split: str,
) -> tuple[list[Any], Report]:
    """Rows of `data.train` or `data.eval`; `task:NAME` stands for the task's own rows of that
    split.
    """
    source: Any = getattr(recipe.data, split)
    if source.startswith("task:"):
        assert task is not None
        source = task.rows(plan.data, split)
    family = () if load is load_prompts else (plan.data,)
    rows, report = load(recipe.data, *family, pair.tokenizer, source=source)
    return list(rows), report


def _scored(
    bundles: list[Bundle], recipe: Recipe, plan: Plan, pair: PolicyPair, accelerator: Accelerator
) -> list[Bundle]:
    """The bundles with the reference's log-probs, each rank scoring its share or reading it from
    `reference.store`.
    """
    rank = accelerator.process_index
    world = accelerator.num_processes
    store = recipe.reference.store
    mine = bundles[rank::world]
    if mine:
        mine = (
            cached_in(Path(store).expanduser(), pair, mine, plan)
            if store
            else pair.cached(mine, plan)
        )
    if world == 1:
        return mine
    shares = gather_object([[b.tokens["reference"] for b in mine]])
    tokens = {
        place: found
        for first, share in enumerate(shares)
        for place, found in zip(range(first, len(bundles), world), share)
    }
    return [replace(b, tokens={**b.tokens, "reference": tokens[i]}) for i, b in enumerate(bundles)]


def _after(
    text: str,
    name: str,
    bundles: list[Bundle],
    recipe: Recipe,
    plan: Plan,
    pair: PolicyPair,
    accelerator: Accelerator,
) -> list[Bundle]:
    """The bundles with tokens[name], the reference's log-probs where `text` comes before the prompt
    (behind a start token).
    """
    ids = torch.tensor(pair.tokenizer(text, add_special_tokens=False).input_ids)
    start = pair.tokenizer.bos_token_id
    if not len(ids):
        raise ConfigError(
            f"objective.{name}: the tokenizer makes no token of {text!r}; give a text"
        )
    moved = []
    for bundle in bundles:
        first = 1 if start is not None and bundle.prompt[0] == start else 0
        moved.append(
            replace(
                bundle,
                prompt=torch.cat([bundle.prompt[:first], ids, bundle.prompt[first:]]),
                tokens={},
            )
        )
    scored = _scored(moved, recipe, plan, pair, accelerator)
    return [
        replace(b, tokens={**b.tokens, name: s.tokens["reference"]})
        for b, s in zip(bundles, scored)
    ]


def _sampling(
    recipe: Recipe, pair: PolicyPair, prompts: list[Tensor]
) -> Callable[[int], list[dict[str, Any]]]:
    """step -> rows for samples.jsonl: the same prompts and the same noise each time, so that only
    the policy differs.
    """
    with pair.model("policy") as model:
        context = context_length(model)
    fitting = [ids for ids in prompts if len(ids) < context]
    room = min([recipe.rollout.max_new_tokens, *(context - len(ids) for ids in fitting)])
    few = recipe.rollout.model_copy(update={"max_new_tokens": room, "engine": "hf"})
    sampler = make_sampler(few, pair, seed=recipe.train.seed, exact=False)

    def samples(step: int) -> list[dict[str, Any]]:
        drawn = sampler.sample(fitting, Draw(1), step=0, prompt_ids=range(len(fitting)))
        return [
            {
                "step": step,
                "prompt": decode(pair.tokenizer, prompt),
                "completion": decode(pair.tokenizer, samples[0].ids),
            }
            for prompt, samples in zip(fitting, drawn)
        ]

    return samples
