"""Rewards of single tokens: what is exact by enumeration, what is not and refused, and their way
from a function into the batch.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from alignkit.batches import Bundle, Plan, RolloutBatch
from alignkit.config.rewards import RewardConfig
from alignkit.errors import ConfigError, DataError, NumericsError
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.oracles.gradients import Population, gradient, regularised_value
from alignkit.rewards import Reward, load_rewards
from alignkit.rewards.combine import Part
from alignkit.rollout.protocol import Sample
from alignkit.sources.scoring import Scoring

F64 = torch.float64
BETA = 0.3
POPULATION = Population.build(seed=3)
SCORES = torch.tensor([0.2, -0.7, 1.5, 0.9, 0.0, -1.2, 0.4, 2.0, -0.3], dtype=F64)
OBJECTIVE = KLPPO(beta=BETA, whiten_advantages=False, value_weight=0.0, aggregation="sequence_sum")


@dataclass(frozen=True)
class Dense(Population):
    """With rewards of single tokens, which a return-to-go reads."""

    token_rewards: torch.Tensor | None = None  # [9, 2]

    def batch(self, objective, theta, scores) -> RolloutBatch:
        return replace(
            super().batch(objective, theta, scores), rewards=self.token_rewards[self.rows]
        )


def wanted(scores):
    return gradient(
        lambda theta: (
            -regularised_value(POPULATION.tree, theta, scores, POPULATION.reference, BETA)
        ),
        POPULATION.theta,
    )


def delivered_to_go(token_rewards):
    population = Dense(**vars(POPULATION), token_rewards=token_rewards)
    return population.delivered(OBJECTIVE, token_rewards.sum(-1))


def test_the_full_return_of_an_attribution_is_exact():
    """Whatever the split, its sum on every token is the score: the form `return`."""
    noise = torch.Generator().manual_seed(1)
    split = torch.randn(9, 2, generator=noise, dtype=F64)
    scores = split.sum(-1)
    assert (POPULATION.delivered(OBJECTIVE, scores) - wanted(scores)).abs().max() < 1e-10


def test_what_a_prompt_adds_to_all_changes_nothing():
    """Attributions that add up to score - base(prompt)."""
    shifted = POPULATION.delivered(OBJECTIVE, SCORES - 0.7)
    assert (shifted - wanted(SCORES)).abs().max() < 1e-10


def test_a_return_to_go_of_prefixes_is_exact():
    """Differences of values of prefixes: the first token's reward depends on it alone."""
    first_symbol = POPULATION.tree.tokens[:, 0]
    value_of_prefix = torch.tensor([0.4, -1.0, 0.3], dtype=F64)[first_symbol]
    split = torch.stack([value_of_prefix - 0.1, SCORES - value_of_prefix], 1)
    assert (delivered_to_go(split) - wanted(SCORES)).abs().max() < 1e-10


def test_a_return_to_go_of_an_attribution_is_wrong():
    """The first token's reward has read the second token, and the second is not charged for it."""
    split = torch.stack([0.5 * SCORES, 0.5 * SCORES], 1)
    error = (delivered_to_go(split) - wanted(SCORES)).abs().max()
    assert error > 0.2 * wanted(SCORES).abs().max()


def halves(prompts, completions, completion_ids, **_):
    """A number per token, and one number for the completion that says so."""
    return [
        3.0 if text == "one" else [0.5 * (k + 1) for k in range(len(ids))]
        for text, ids in zip(completions, completion_ids)
    ]


def causal(prompts, completions, completion_ids, **_):
    return halves(prompts, completions, completion_ids)


causal.causal = True
IDS = [[5, 6, 7], [5, 6]]
CALL = {"prompts": ["p", "p"], "completions": ["many", "one"], "completion_ids": IDS}


def test_numbers_of_tokens_are_summed_unless_they_are_kept_apart():
    summed = Reward([Part("halves", halves, 2.0)])
    assert summed(**CALL) == [6.0, 6.0]
    assert summed.token_rewards is None

    apart = Reward(
        [Part("causal", causal, 2.0, to_go=True), Part("ten", lambda *_, **__: [10, None])]
    )
    assert apart(**CALL) == [16.0, 6.0]
    assert apart.token_rewards == [[1.0, 2.0, 13.0], [0.0, 6.0]]  # numbers of no token: the last


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([[1.0, 2.0], 0.0], DataError, "2 numbers for completion 0, which has 3 tokens"),
        ([[1.0, 2.0, "x"], 0.0], DataError, "'x'"),
        ([[1.0, 2.0, float("nan")], 0.0], NumericsError, "nan"),
        ([[1.0, 2.0, 3.0]], DataError, "1 values for 2 completions"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values, error, match):
    with pytest.raises(error, match=match):
        Reward([Part("given", lambda *_, **__: values)])(**CALL)


def test_tensors_of_numbers_are_read():
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.5)]
    assert Reward([Part("given", lambda *_, **__: values)])(**CALL) == [6.0, 0.5]


def test_a_return_to_go_is_refused_unless_the_function_says_that_it_is_causal():
    entry = {"function": f"{__file__}:halves", "credit": "to_go"}
    with pytest.raises(ConfigError, match="causal = True"):
        load_rewards([entry], safe=False)
    (part,) = load_rewards([entry | {"function": f"{__file__}:causal"}], safe=False).parts
    assert part.to_go
    with pytest.raises(ValueError, match="for a function"):
        RewardConfig(format="a", credit="to_go")


def test_rewards_of_tokens_reach_the_batch():
    reward = Reward([Part("causal", causal, to_go=True)])
    scoring = Scoring(Plan("rollout", feedback="reward"), lambda prompt, ids: "many", reward)
    ids = [torch.tensor(row) for row in IDS]
    samples = [Sample(row, torch.zeros(len(row)), ended=True) for row in ids]
    bundle = Bundle(torch.tensor([1]), ids, [torch.ones_like(row).bool() for row in ids])
    prompt = SimpleNamespace(text="p", columns={})
    (scored,) = scoring.score([prompt], [bundle], [samples], [[]], step=0)
    assert scored.rows["score"].tolist() == [3.0, 1.5]
    assert [row.tolist() for row in scored.tokens["reward"]] == [[0.5, 1.0, 1.5], [0.5, 1.0]]
