"""The KL to the policy's own law given a constraint, by enumeration of all texts."""

from itertools import product

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import constrained_kl

F64 = torch.float64
VOCAB, LENGTH = 3, 3
NOISE = torch.Generator().manual_seed(0)
LAWS = {
    prefix: torch.randn(VOCAB, dtype=F64, generator=NOISE).log_softmax(-1)
    for length in range(LENGTH)
    for prefix in product(range(VOCAB), repeat=length)
}
# Texts without two equal neighbours, not all of which begin alike: after some prefixes none is left.
MEET = {
    text for text in product(range(VOCAB), repeat=LENGTH) if len(set(text)) == 3 or text[0] == 2
}


def chance(text):
    """That a text which begins like this meets the constraint."""
    if len(text) == LENGTH:
        return float(text in MEET)
    return sum(float(LAWS[text][token].exp()) * chance((*text, token)) for token in range(VOCAB))


def chances(prefix):
    return torch.tensor([chance((*prefix, token)) for token in range(VOCAB)], dtype=F64)


def test_along_the_posterior_it_sums_to_the_constraints_surprise():
    """sum over prefixes of P(prefix | constraint) KL = -log P(constraint)."""
    whole = chance(())
    total = 0.0
    for prefix, law in LAWS.items():
        probability = 1.0
        for place, token in enumerate(prefix):
            probability *= float(LAWS[prefix[:place]][token].exp())
        reached = probability * chance(prefix) / whole
        total += reached * float(constrained_kl(law, chances(prefix)))
    assert 0 < whole < 1
    assert total == pytest.approx(-float(torch.tensor(whole, dtype=F64).log()), abs=1e-12)


def test_its_gradient_is_the_policy_less_the_posterior():
    logits = LAWS[0,].clone().requires_grad_()
    constrained_kl(logits.log_softmax(-1), chances((0,))).backward()
    policy = LAWS[0,].exp()
    posterior = policy * chances((0,))
    torch.testing.assert_close(
        logits.grad, policy - posterior / posterior.sum(), atol=1e-12, rtol=0
    )


def test_where_the_constraint_holds_anyway_or_cannot_hold_nothing_is_pulled():
    law = LAWS[()].clone().requires_grad_()
    rows = constrained_kl(law.expand(2, -1), torch.tensor([[0.3] * 3, [0.0] * 3], dtype=F64))
    torch.testing.assert_close(rows, torch.zeros(2, dtype=F64), atol=1e-12, rtol=0)
    rows.sum().backward()
    assert law.grad.isfinite().all()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        constrained_kl(LAWS[()], torch.tensor([0.0, 1.1, 0.5], dtype=F64))
