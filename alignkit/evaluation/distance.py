"""How far a trained run is from its own optimum: KL(policy || reference e^(r / beta) / Z) in nats."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from alignkit.batches import Draw
from alignkit.config.objective import build_objective
from alignkit.errors import ConfigError
from alignkit.evaluation.measurements import Measured
from alignkit.evaluation.shared import Shared
from alignkit.metrics.baselines import log_partition_bounds
from alignkit.metrics.intervals import Array, mean_interval
from alignkit.objectives.base import Objective, tilted
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.text import decode_all


def reference_scores(shared: Shared, samples: int) -> Array:
    """Scores of `samples` completions of the reference for each prompt, [P, samples]. ConfigError
    where there is no score, or not for every completion.
    """
    yardstick = replace(shared.yardstick, samples=samples)
    sampler = HFSampler(
        shared.reference, max_new_tokens=yardstick.max_new_tokens, seed=yardstick.seed + 1
    )
    prompts = [prompt.ids for prompt in yardstick.prompts]
    drawn = sampler.sample(prompts, Draw(samples), step=0, prompt_ids=range(len(prompts)))
    ids = [[sample.ids for sample in row] for row in drawn]
    scores = yardstick.scores(decode_all(shared.reference.tokenizer, ids), ids)
    if scores is None or np.isnan(scores).any():
        raise ConfigError("--distance needs a score for every completion; give --reward")
    return scores


def tilt_of(objective: Objective) -> float | None:
    """The beta at which the objective's optimum is the tilted law; None where it is another law."""
    beta = getattr(objective, "beta", None)
    if not isinstance(beta, float):
        return None
    reward = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    optimum = objective.optimum(reward, reference)
    expected = tilted(reward, reference, beta)
    return beta if optimum is not None and torch.allclose(optimum, expected) else None


def distance(shared: Shared, name: str, measured: Measured, scores: Array) -> dict[str, Any]:
    """The distance of a run to its optimum under the measured score, as an interval: log Z - E[r /
    beta] + KL(policy || reference), with log Z from both sides. Nothing for a model that is no run,
    and for objectives with another optimum.
    """
    recipe = shared.request.recipes.get(name)
    if recipe is None or measured.score is None or recipe.data.has_streams:
        return {}
    beta = tilt_of(build_objective(recipe.objective, recipe.origin, safe=shared.request.safe))
    if beta is None:
        return {}

    means = measured.per_prompt()
    rest = means["kl"] - means["score"] / beta
    low, high = (mean_interval(log_z + rest) for log_z in log_partition_bounds(scores, beta))
    return {"distance": {"beta": beta, "low": asdict(low), "high": asdict(high)}}
