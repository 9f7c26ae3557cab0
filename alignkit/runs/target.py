"""A target from constraints: samples of a model, their features, and the weights with which
`fdpg` reaches the means that were asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignkit.decoding.moments import MomentFit, fit_moments
from alignkit.errors import ConfigError, DataError
from alignkit.rewards.call import call_reward
from alignkit.rewards.load import load_rewards
from alignkit.rollout.text import as_reply, decode
from alignkit.runs.sampled_answers import sample_answers


@dataclass(frozen=True)
class TargetRequest:
    """Which means the features should have under the target, and from how many samples that is
    found out.
    """

    model: str
    prompts: str  # a file, a data set, or task:NAME
    features: Sequence[str]  # FILE.py:NAME or module:NAME, as reward functions
    means: Sequence[float]
    samples: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    safe: bool = False

    def __post_init__(self) -> None:
        if not self.features:
            raise ConfigError("fit-target: no constraint; give --feature FILE.py:NAME=MEAN")
        if len(set(self.features)) < len(self.features):
            raise ConfigError("fit-target: a feature is given twice; give each one mean")
        if self.samples < 2:
            raise ConfigError(f"fit-target: samples is {self.samples}; give at least 2")


def parse_constraint(text: str) -> tuple[str, float]:
    """`FILE.py:NAME=MEAN` -> the function's name and the mean. ConfigError for anything else."""
    name, _, mean = text.rpartition("=")
    try:
        value = float(mean)
    except ValueError:
        value = float("nan")
    if ":" not in name or not abs(value) < float("inf"):
        raise ConfigError(
            f"fit-target: --feature {text} is no constraint; give FILE.py:NAME=MEAN with a number"
        )
    return name, value


def fit_target(request: TargetRequest) -> MomentFit:
    """Sample, compute the features and fit; see `alignkit.decoding.moments.fit_moments`.

    DataError for a completion that a feature does not apply to.
    """
    answers = sample_answers(request)
    replies = [
        [as_reply(prompt.text, decode(answers.tokenizer, sample.ids)) for sample in samples]
        for prompt, samples in zip(answers.prompts, answers.samples)
    ]

    columns = []
    for name in request.features:
        feature = load_rewards([{"function": name}], safe=request.safe, device="cpu")
        values = call_reward(feature, answers.prompts, replies, answers.ids)
        if any(value is None for row in values for value in row):
            raise DataError(
                f"fit-target: {name} has no value for a completion; give a number for each"
            )
        columns.append(torch.tensor(values, dtype=torch.float64))
    means = torch.tensor(request.means, dtype=torch.float64)
    return fit_moments(torch.stack(columns, -1), means, names=request.features)


def as_overrides(request: TargetRequest, fit: MomentFit) -> list[str]:
    """The fields of a recipe that make `fdpg` learn the target."""
    rewards = [
        {"function": name, "weight": weight}
        for name, weight in zip(request.features, fit.lambdas.tolist())
    ]
    return ["objective.beta=1", f"rewards={json.dumps(rewards)}"]
