"""A small online run for tests: a reward and a judge that want one token, and a job that samples
from a tiny model.
"""

from types import SimpleNamespace

import torch
from world import make_job, pairs

from alignkit.config.rollout import RolloutConfig
from alignkit.rollout.engines import make_sampler
from alignkit.rollout.importance import Correction
from alignkit.rollout.policy_copy import PolicyCopy
from alignkit.sources.rollouts import RolloutSource
from alignkit.sources.scoring import Scoring

WANTED = 5


def share_of_wanted(prompts, completions, **columns):
    return [sum(i == WANTED for i in ids) / max(1, len(ids)) for ids in columns["completion_ids"]]


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
