"""Nash-MD's loss against the enumerated gradient over sequences of one or two tokens."""

import math

import pytest
import torch
from torch import Tensor

from alignkit.losses import nash_md_loss

F64 = torch.float64

# symbol 2 ends a sequence
SEQUENCES = [(a, b) for a in (0, 1) for b in (0, 1, 2)] + [(2, 0)]
MASK = torch.tensor([[True, True]] * 6 + [[True, False]])


def sequence_logps(logits: Tensor) -> Tensor:
    """Token log-probs [7, 2] of all sequences; logits [4, 3]: the first token's, then the second's
    after each first token.
    """
    table = logits.log_softmax(-1)
    rows = torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in SEQUENCES])
    return torch.where(MASK, rows, 0.0)


def nash_md_setting(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, 4, 3, generator=generator, dtype=F64)
    win_rate = torch.rand(7, generator=generator, dtype=F64)
    return logits.requires_grad_(), sequence_logps(reference), win_rate


def exact_gradient(logits, reference, win_rate, beta):
    logps = sequence_logps(logits).sum(-1)
    value = (logps.exp() * (win_rate - beta * (logps - reference.sum(-1)))).sum()
    return torch.autograd.grad(-value, logits)[0]


def expected_gradient(logits, losses):
    weights = sequence_logps(logits).sum(-1).exp().detach()
    return torch.autograd.grad((weights * losses).sum(), logits)[0]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_nash_md_gradient_equals_the_enumerated_one(seed, beta):
    logits, reference, win_rate = nash_md_setting(seed)
    losses = nash_md_loss(sequence_logps(logits), reference, win_rate, MASK, beta=beta)
    torch.testing.assert_close(
        expected_gradient(logits, losses),
        exact_gradient(logits, reference, win_rate, beta),
        rtol=0,
        atol=1e-14,
    )


def test_a_kl_charged_token_by_token_is_visibly_wrong():
    logits, reference, win_rate = nash_md_setting(0)
    logps = sequence_logps(logits)
    token_credit = win_rate.unsqueeze(-1) - 0.5 - (logps - reference).detach()
    exact = exact_gradient(logits, reference, win_rate, 1.0)
    error = expected_gradient(logits, -(token_credit * logps).sum(-1)) - exact
    assert error.abs().max() > 0.1 * exact.abs().max()


def test_nash_md_loss_by_hand():
    policy, reference = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    got = nash_md_loss(policy, reference, torch.tensor([0.75]), mask, beta=0.1)
    # log-ratios 0.5, -1; to go -0.5, -1; credits 0.25 + 0.05, 0.25 + 0.1
    assert got.tolist() == pytest.approx([0.30 * 1 + 0.35 * 2])


def test_what_lies_outside_the_mask_changes_nothing():
    policy = torch.tensor([[-1.0, math.nan], [-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, math.inf], [-2.0, -2.0]])
    mask = torch.tensor([[True, False], [False, False]])
    losses = nash_md_loss(policy, reference, torch.tensor([1.0, 1.0]), mask, beta=1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.5, 0.0]
    assert policy.grad.tolist() == [[-0.5, 0.0], [0.0, 0.0]]
