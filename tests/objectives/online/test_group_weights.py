"""Weights within a group: by entropy (EGSW), by difficulty and length (asymmetric PO). Worked
numbers, limits, and what must not matter.
"""

from dataclasses import replace

import pytest
import torch

from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.errors import ConfigError, ShapeError
from alignkit.losses import egsw_weights
from alignkit.objectives.online.asymmetric_po import AsymmetricPO, overlong_factors
from alignkit.objectives.online.egsw import EGSW
from alignkit.objectives.online.grpo import GRPO

F64 = torch.float64
NAN = float("nan")
WORKED = {"alpha": 0.5, "temperature": 1.5}


def column(*values):
    return torch.tensor(values, dtype=F64).unsqueeze(-1)


def rollout(lengths, scores, groups):
    """Completions of these lengths, with a hole in the first one's mask."""
    noise = torch.Generator().manual_seed(5)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    mask[0, 1] = False
    logps = torch.randn(mask.shape, generator=noise, dtype=F64)
    reference = torch.randn(mask.shape, generator=noise, dtype=F64)
    entropy = torch.rand(mask.shape, generator=noise, dtype=F64)
    tokens = TokenLogps(logps, {"reference": reference}, mask, logps, {"entropy": entropy})
    return RolloutBatch(tokens, torch.tensor(scores, dtype=F64), torch.tensor(groups))


@pytest.fixture
def batch():
    return rollout([6, 2, 4, 3, 3], [1.0, -0.5, 0.2, 2.0, 1.0], [7, 7, 7, 3, 3])


def credited(objective, batch):
    return objective.credit(batch, objective.init_state())[0]


def test_egsw_worked_numbers():
    """A = (1, -0.5, 0.2), H = (0.3, 0.8, 0.5), alpha 0.5, P 1.5."""
    mask = torch.ones(3, 1, dtype=torch.bool)
    weights = egsw_weights(
        column(1, -0.5, 0.2), column(0.3, 0.8, 0.5), mask, torch.zeros(3).long(), **WORKED
    )
    expected = column(0.4850, 0.2108, 0.3042)
    torch.testing.assert_close(weights, expected, rtol=0, atol=5e-5)


def test_egsw_counts_only_completions_that_are_still_going_on():
    """Own tokens are numbered, so that a foreign one in between moves no other."""
    own = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0]]).bool()
    advantages = torch.where(own, column(1, -0.5, 0.2), NAN)
    entropy = torch.full_like(advantages, 0.3)
    weights = egsw_weights(advantages, entropy, own, torch.zeros(3).long(), **WORKED)
    assert torch.equal(weights[~own], torch.zeros(4, dtype=F64))
    assert float(weights[:, 0].sum()) == pytest.approx(1)
    assert float(weights[0, 2] + weights[1, 1]) == pytest.approx(1)
    assert float(weights[0, 2] / weights[1, 1]) == pytest.approx(torch.tensor(1.0).exp().item())


def test_egsw_by_completion_takes_the_mean_entropy(batch):
    tokens = batch.tokens
    mean = torch.where(tokens.mask, tokens.extras["entropy"], 0.0).sum(-1) / tokens.lengths
    level = replace(tokens, extras={"entropy": mean.unsqueeze(-1).expand(tokens.mask.shape)})
    by_completion = credited(EGSW(entropy_of="completion"), batch).advantages
    torch.testing.assert_close(
        by_completion, credited(EGSW(), replace(batch, tokens=level)).advantages, rtol=0, atol=1e-12
    )
    assert not torch.allclose(by_completion, credited(EGSW(), batch).advantages)


@pytest.mark.parametrize("entropy_of", ["token", "completion"])
def test_egsw_at_a_high_temperature_is_grpo(batch, entropy_of):
    plain = credited(GRPO(), batch).advantages
    hot = credited(EGSW(temperature=1e13, entropy_of=entropy_of), batch).advantages
    torch.testing.assert_close(hot, plain, rtol=0, atol=1e-12)
    assert torch.equal(credited(EGSW(temperature=None), batch).advantages, plain)
    assert not torch.allclose(credited(EGSW(), batch).advantages, plain)


def test_egsw_of_one_group_does_not_depend_on_the_others(batch):
    alone = replace(
        batch,
        tokens=batch.tokens.select(torch.tensor([3, 4])),
        scores=batch.scores[3:],
        groups=batch.groups[3:],
    )
    together = credited(EGSW(), batch).advantages[3:]
    torch.testing.assert_close(together, credited(EGSW(), alone).advantages, rtol=0, atol=1e-12)


def test_egsw_refuses_what_does_not_fit():
    one = torch.ones(2, 1, dtype=F64)
    groups = torch.zeros(2).long()
    with pytest.raises(ConfigError, match="temperature"):
        egsw_weights(one, one, one.bool(), groups, alpha=0.5, temperature=0.0)
    with pytest.raises(ConfigError, match="alpha"):
        egsw_weights(one, one, one.bool(), groups, alpha=-0.5, temperature=1.0)
    with pytest.raises(ShapeError, match="groups"):
        egsw_weights(one, one, one.bool(), groups[:1], **WORKED)


def test_overlong_completions_count_more():
    """1000 tokens longer than the mean correct one: 2 - 1.00001^-1000 = 1.00995."""
    lengths = torch.tensor([100, 300, 1200, 150, 1200, 5000])
    correct = torch.tensor([True, True, False, False, False, False])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    factors = overlong_factors(lengths, correct, groups, base=1.00001)
    assert float(factors[2]) == pytest.approx(1.00995, abs=5e-6)
    assert factors.tolist() == [1, float(2 - 1.00001**-100), float(factors[2]), 1, 1, 1]


def test_asymmetric_po_switched_off_is_grpo(batch):
    off = credited(AsymmetricPO(difficulty_kl="off", length_base=1.0), batch)
    plain = credited(GRPO(), batch)
    assert torch.equal(off.advantages, plain.advantages)
    losses = [
        objective.loss(result).terms[0].values
        for objective, result in (
            (AsymmetricPO(difficulty_kl="off", length_base=1.0), off),
            (GRPO(), plain),
        )
    ]
    assert torch.equal(*losses)


def test_asymmetric_po_weighs_the_kl_of_good_completions_by_the_pass_rate(batch):
    """Scores 1, -0.5, 0.2 with two above 0, and 2, 1 which both are."""
    result = credited(AsymmetricPO(), batch)
    mask = batch.tokens.mask
    advantages = result.advantages
    rates = torch.tensor([2 / 3, 2 / 3, 2 / 3, 1, 1], dtype=F64).unsqueeze(-1).expand(mask.shape)
    wanted = torch.where(advantages > 0, rates, 1.0)
    torch.testing.assert_close(result.weights[mask], wanted[mask], rtol=0, atol=1e-12)
    strict = credited(AsymmetricPO(threshold=0.5), batch).weights
    assert float(strict[0, 0]) == pytest.approx(1 / 3)

    # The KL's part is the difference to the loss without a KL.
    def penalty(objective):
        with_kl, without = (
            objective(beta=beta).loss(result).terms[0].values for beta in (0.1, 1e-300)
        )
        return with_kl - without

    torch.testing.assert_close(penalty(AsymmetricPO), result.weights[:, 0] * penalty(GRPO))


def test_asymmetric_po_scales_overlong_bad_completions_alone(batch):
    """In the first group 5 own tokens are wrong; the correct ones have 2 and 4."""
    batch = replace(batch, scores=torch.tensor([-0.5, 1.0, 0.9, 2.0, 1.0], dtype=F64))
    result = credited(AsymmetricPO(length_base=1.5), batch).advantages
    plain = credited(GRPO(), batch).advantages
    factor = 2 - 1.5 ** -(5 - 3)
    torch.testing.assert_close(result[0], factor * plain[0])
    assert torch.equal(result[1:], plain[1:])
