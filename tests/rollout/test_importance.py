"""An engine that samples from nearly the policy: the weights undo it exactly, the cap and the limit
hold.
"""

from itertools import product

import pytest
import torch
from accelerate import Accelerator

from alignkit.batches import Bundle, LossTerms, Term, TokenLogps
from alignkit.errors import ResourceError
from alignkit.rollout.importance import Correction, mismatch, weighted


def chains(seed, drift):
    """Log-probs of all 27 completions of 3 tokens out of 3, under a trainer and under an engine
    that is `drift` off: [27, 3].
    """
    generator = torch.Generator().manual_seed(seed)
    # position, previous token, token
    table = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    engine = (
        table + drift * torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    ).log_softmax(-1)
    trainer = table.log_softmax(-1)
    rows = list(product(range(3), repeat=3))
    return [
        torch.stack(
            [torch.stack([p[t, y[t - 1] if t else 0, y[t]] for t in range(3)]) for y in rows]
        )
        for p in (trainer, engine)
    ]


def tokens_of(policy, behavior):
    return TokenLogps(policy, {}, torch.ones(policy.shape, dtype=torch.bool), behavior)


def weighed(trainer, engine, *, cap=1e6, completions=1):
    """The weights through the bundles that carry them, and what is told."""
    one = torch.ones(1, dtype=torch.bool)
    bundle = Bundle(torch.tensor([1]), [torch.tensor([2])] * completions, [one] * completions)
    correction = Correction(cap=cap, limit=10.0)
    return correction.weigh(
        [bundle] * (len(trainer) // completions), tokens_of(trainer, engine), Accelerator(cpu=True)
    )


def test_the_weighted_mean_over_the_engines_samples_is_the_trainers_mean():
    """Enumerated: sum_y engine(y) w(y) f(y) = sum_y trainer(y) f(y) for any f, per completion and
    per token.
    """
    trainer, engine = chains(0, 0.3)
    bundles, figures = weighed(trainer, engine, completions=3)
    drawn, wanted = engine.sum(-1).exp(), trainer.sum(-1).exp()
    assert float((drawn - wanted).abs().max()) > 0.01
    losses = torch.randn(27, dtype=torch.float64), torch.randn(27, 3, dtype=torch.float64)
    out = weighted(
        LossTerms([Term("rows", losses[0]), Term("tokens", losses[1], "tokens")]), bundles
    )
    for term, loss in zip(out.terms, losses, strict=True):
        assert torch.allclose((drawn @ term.values), wanted @ loss, atol=1e-12)
    assert figures["sampling/importance_capped"] == 0


def test_the_loss_of_a_pair_takes_both_weights():
    trainer, engine = chains(1, 0.3)
    first, second = torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], 1).flatten()  # all 729 of them
    bundles, _ = weighed(trainer[pairs], engine[pairs], completions=2)
    losses = torch.randn(729, dtype=torch.float64)
    (term,) = weighted(LossTerms([Term("pair", losses)]), bundles).terms
    drawn, wanted = (
        torch.outer(p, p).flatten() for p in (engine.sum(-1).exp(), trainer.sum(-1).exp())
    )
    assert torch.allclose(drawn @ term.values, wanted @ losses, atol=1e-12)


def test_the_cap_and_what_is_told():
    trainer, engine = chains(2, 0.4)
    bundles, figures = weighed(trainer, engine, cap=1.1)
    ratio = (trainer - engine).sum(-1).exp()
    assert torch.allclose(torch.cat([b.rows["importance"] for b in bundles]), ratio.clamp(max=1.1))
    assert figures["sampling/importance_capped"] == pytest.approx(
        float((ratio > 1.1).double().mean())
    )
    assert 0 < figures["sampling/importance_capped"] < 1
    assert figures["sampling/importance_mean"] == pytest.approx(float(ratio.clamp(max=1.1).mean()))
    found = mismatch(tokens_of(trainer, engine), Accelerator(cpu=True))
    gap = trainer - engine
    assert found["sampling/logp_difference_max"] == pytest.approx(float(gap.abs().max()))
    assert found["sampling/mismatch_kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()))


def test_other_weights_are_told_from_rounding():
    """k3 of an engine that samples from another policy is a KL of nats; rounding gives 1e-14 to
    1e-3.
    """
    trainer, engine = chains(3, 1.5)
    check, accelerator = Correction(cap=2.0, limit=0.1).check, Accelerator(cpu=True)
    with pytest.raises(
        ResourceError,
        match=r"nats per token from the trainer's, more than rollout.max_mismatch 0.1",
    ):
        check(mismatch(tokens_of(trainer, engine), accelerator))
    with pytest.raises(ResourceError, match="nan nats"):
        check(mismatch(tokens_of(trainer, engine * torch.nan), accelerator))
    check(mismatch(tokens_of(trainer, trainer + 1e-3), accelerator))


def test_without_importance_terms_stay_as_they_are():
    out = LossTerms([Term("a", torch.ones(2))])
    assert (
        weighted(out, [Bundle(torch.tensor([1]), [torch.tensor([2])], [torch.tensor([True])])] * 2)
        is out
    )
