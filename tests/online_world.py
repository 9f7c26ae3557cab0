"""A small online run for tests: a reward and a judge that want one token, and a job that samples
from a tiny model.
"""

from types import SimpleNamespace

import torch
from episode_worlds import Echo
from world import make_job, pairs

from alignkit.batches import FAMILIES
from alignkit.config.allocation import AllocateConfig
from alignkit.config.data import DataConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.objectives.streams import Stream, Streams
from alignkit.rewards.combine import Part, Reward
from alignkit.rollout.engines import make_sampler
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.importance import Correction
from alignkit.rollout.policy_copy import PolicyCopy
from alignkit.rollout.renderer import TextRenderer
from alignkit.rollout.turns import TurnSampler
from alignkit.sources.budgets import Allocation
from alignkit.sources.dataset import DatasetSource
from alignkit.sources.rollouts import RolloutSource
from alignkit.sources.scoring import Scoring
from alignkit.sources.streams import StreamSource

WANTED = 5


def share_of_wanted(prompts, completions, **columns):
    return [sum(i == WANTED for i in ids) / max(1, len(ids)) for ids in columns["completion_ids"]]


def where_wanted(prompts, completions, **columns):
    """One number for each token."""
    return [[float(i == WANTED) for i in ids] for ids in columns["completion_ids"]]


def more_wanted(prompts, first, second):
    counts = [[text.split().count(f"w{WANTED}") for text in side] for side in (first, second)]
    p = torch.tensor([(a > b) + 0.5 * (a == b) for a, b in zip(*counts)])
    return SimpleNamespace(probability=p, valid=torch.ones(len(p), dtype=torch.bool))


def online_job(
    model,
    out,
    objective,
    *,
    reward=share_of_wanted,
    judge=more_wanted,
    n_prompts=10,
    prompts_per_step=4,
    ahead=0,
    **settings,
):
    job = make_job(model, out, objective, pairs(1), **settings)
    prompts = [
        SimpleNamespace(ids=b.prompt, text=f"p{i}", uid=b.uid, columns={"n": i})
        for i, b in enumerate(pairs(n_prompts, seed=3))
    ]
    rollout = RolloutConfig(completions=4, max_new_tokens=6)

    def decode(prompt, ids):
        return job.pair.tokenizer.decode(ids)

    models = PolicyCopy(job.pair) if ahead else job.pair
    job.source = RolloutSource(
        prompts, objective, job.pair, make_sampler(rollout, models, seed=0), Scoring(objective.plan, decode, reward, judge),
        job.accelerator, batch_size=prompts_per_step, completions=4, seed=0, ahead=ahead,
        correction=Correction(cap=2.0) if ahead else None,
    )  # fmt: skip
    return job


def streams_job(model, out, parts, *, reweigh=None, **settings):
    """Streams of 3 rows or prompts per step each: `parts` are name, objective, weight."""
    streams = [Stream(*part) for part in parts]
    job = make_job(model, out, Streams(streams=streams), pairs(1), **settings)
    job.source = StreamSource(
        streams, [_source_of(job, s.objective, number) for number, s in enumerate(streams)], reweigh
    )
    return job


def _source_of(job, objective, seed):
    plan = objective.plan
    if FAMILIES[plan.data].sampled:
        return _rollouts(job, objective, seed)
    rows = pairs(20, seed=seed, k=2 if plan.data == "pair" else 1)
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    return DatasetSource(rows, plan, 3, seed=seed, rank=rank, world=world)


def _rollouts(job, objective, seed):
    prompts = [
        SimpleNamespace(ids=b.prompt, text=f"p{i}", uid=b.uid, columns={})
        for i, b in enumerate(pairs(10, seed=3))
    ]
    sampler = make_sampler(RolloutConfig(completions=4, max_new_tokens=6), job.pair, seed=seed)
    scoring = Scoring(
        objective.plan, lambda prompt, ids: job.pair.tokenizer.decode(ids), share_of_wanted
    )
    return RolloutSource(
        prompts, objective, job.pair, sampler, scoring, job.accelerator, batch_size=3, completions=4,
        seed=seed,
    )  # fmt: skip


def budgeted_job(model, out, objective, **settings):
    """Two prompts per step with numbers of completions of their own, and rewards of tokens."""
    reward = Reward([Part("wanted", where_wanted, to_go=True)])
    job = online_job(model, out, objective, reward=reward, prompts_per_step=2, **settings)
    job.source.allocation = Allocation(AllocateConfig(pilot=2, threshold=0.5), mean=4, room=6)
    return job


def turns_job(model, out, objective, *, cap=24, **settings):
    """Episodes in a world that says the last word again; some end long before others."""
    job = online_job(model, out, objective, reward=None, **settings)
    source = job.source
    source.sampler.max_new_tokens = cap
    source.turns = TurnSampler(
        source.sampler,
        LocalEnvironments(Echo),
        TextRenderer(job.pair.tokenizer, DataConfig()),
        turns=4,
        max_new_tokens=cap,
        context=128,
        seed=0,
    )
    return job
