"""The consensus game and dynamic fusion, against the equations that define them."""

import pytest
import torch

from alignkit.decoding import consensus, dynamic_weight, fuse
from alignkit.errors import ConfigError, NumericsError, ShapeError


def laws(n, seed):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(2, n, generator=generator, dtype=torch.float64).log_softmax(1)
    d = torch.randn(n, 2, generator=generator, dtype=torch.float64).log_softmax(1)
    return g, d


@pytest.mark.parametrize("lam", [0.1, 0.3, 1.0])
def test_the_consensus_is_an_equilibrium(lam):
    """Each policy is the other's regularised best answer, from the first policies of the paper."""
    g, d = laws(5, 0)
    policy_g, policy_d = consensus(g, d, lam=lam)
    first_g = (g.exp() / g.exp().sum(0)) / (g.exp() / g.exp().sum(0)).sum(1, keepdim=True)
    first_d = (d.exp() / d.exp().sum(0)) / (d.exp() / d.exp().sum(0)).sum(1, keepdim=True)
    answer_g = first_g * (policy_d.T / (2 * lam)).exp()
    answer_d = first_d * (policy_g.T / (2 * lam)).exp()
    torch.testing.assert_close(policy_g, answer_g / answer_g.sum(1, keepdim=True))
    torch.testing.assert_close(policy_d, answer_d / answer_d.sum(1, keepdim=True))


def test_above_a_quarter_the_consensus_is_the_only_one():
    """The same from any normalisation, and from regret steps, which begin nowhere near it."""
    lam = 0.3
    g, d = laws(4, 1)
    policy_g = consensus(g, d, lam=lam)[0]
    same = consensus(g + 3.0, d - 1.0, lam=lam)
    torch.testing.assert_close(same[0], policy_g)

    first_g = (g - g.logsumexp(0)).log_softmax(1)
    first_d = (d - d.logsumexp(0)).log_softmax(1)
    from_afar = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]], dtype=torch.float64)
    for _ in range(2000):
        answer = (first_d + from_afar.T / (2 * lam)).softmax(1)
        from_afar = 0.9 * from_afar + 0.1 * (first_g + answer.T / (2 * lam)).softmax(1)
    torch.testing.assert_close(from_afar, policy_g, rtol=0, atol=1e-9)


def test_a_large_lam_keeps_the_first_policies_and_agreement_wins():
    g, d = laws(4, 2)
    first = (g - g.logsumexp(0)).softmax(1)
    torch.testing.assert_close(consensus(g, d, lam=1e9)[0], first, rtol=0, atol=1e-8)

    # Two candidates of the same chance under the generator: the discriminator decides.
    g = torch.tensor([[0.4, 0.4, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    d = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()
    policy_g, policy_d = consensus(g, d, lam=0.1)
    assert policy_g[0].argmax() == 0
    assert policy_d[:, 0].argmax() == 0


def test_the_consensus_refuses_what_does_not_fit():
    g, d = laws(4, 0)
    with pytest.raises(ShapeError, match=r"\[2, n\] and \[n, 2\]"):
        consensus(g, g, lam=0.1)
    with pytest.raises(ConfigError, match="lam is 0"):
        consensus(g, d, lam=0)


def test_dynamic_fusion_goes_as_far_as_the_small_model_went():
    generator = torch.Generator().manual_seed(0)
    large, untuned = (
        torch.randn(6, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
        for _ in range(2)
    )
    step = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    tuned = (untuned + 0.7 * step).log_softmax(-1)
    weight, solved = dynamic_weight(large, tuned, untuned)
    assert solved.all()
    for row in range(6):
        models = {"large": large[row], "tuned": tuned[row], "untuned": untuned[row]}
        a = float(weight[row])
        fused = fuse(models, {"large": 1.0, "tuned": a, "untuned": -a})
        distance = (fused.exp() * (fused - large[row])).sum()
        wanted = (tuned[row].exp() * (tuned[row] - untuned[row])).sum()
        assert float(distance) == pytest.approx(float(wanted), rel=1e-9)

    # Of one model for all three the weight is 1; without a change it is 0.
    weight, _ = dynamic_weight(untuned, tuned, untuned)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    weight, solved = dynamic_weight(large, untuned, untuned)
    assert solved.all()
    assert float(weight.max()) < 1e-9


def test_dynamic_fusion_says_where_there_is_no_weight():
    """The large model has nearly all its mass where the small one went: it cannot go that far."""
    large = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64).log()
    untuned = torch.tensor([0.1, 0.45, 0.45], dtype=torch.float64).log()
    tuned = torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64).log()
    weight, solved = dynamic_weight(large, tuned, untuned)
    assert (float(weight), bool(solved)) == (8.0, False)
    with pytest.raises(NumericsError, match="tuned has a token"):
        dynamic_weight(large, tuned.log(), untuned)
