"""KL-PPO, RPG, GRPO and RLOO as objectives: invariances, state, plans and refusals. Their
gradients: oracles/.
"""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import pad

from alignkit import GRPO, KLPPO, RLOO, RPG
from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.errors import ConfigError

F64 = torch.float64
OBJECTIVES = [
    KLPPO(),
    KLPPO(
        whiten_rewards=True,
        lam=0.9,
        gamma=0.95,
        kl_credit="token",
        dual_clip=3.0,
        aggregation="sequence_mean",
    ),
    RPG(),
    RPG(anchor="behavior", divergence="forward_ukl", estimator="differentiable"),
    RPG(anchor="behavior", kl_credit="token", aggregation="constant", length=5),
    GRPO(),
    GRPO(beta=0.0, scale_by_std=False, aggregation="token_mean"),
    RLOO(),
]
named = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{OBJECTIVES.index(o)}"
)


def rollout(objective, n=6, length=5, seed=0, drift=0.3) -> RolloutBatch:
    """Groups of two; ragged masks, one with a hole; 0 wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.tensor([5, 3, 1, 4, 2, 5])[:n, None]
    mask[0, 1] = False

    def draw():
        return torch.where(mask, -3 * torch.rand(n, length, dtype=F64, generator=generator), 0.0)

    behavior = draw()
    extras = {name: draw().abs() for name in objective.plan.statistics}
    if objective.plan.values:
        extras["values"] = draw()
    noise = torch.where(mask, drift * torch.randn(n, length, dtype=F64, generator=generator), 0.0)
    tokens = TokenLogps(
        behavior + noise, {name: draw() for name in objective.plan.anchors}, mask, behavior, extras
    )
    scores = torch.randn(n, dtype=F64, generator=generator)
    return RolloutBatch(tokens, scores, torch.arange(n) // 2)


def run(objective, batch):
    """Reduced loss, gradient [N, T] and metrics of credit followed by loss."""
    with torch.no_grad():
        credited, _ = objective.credit(batch, objective.init_state())
    policy = batch.tokens.policy.clone().requires_grad_()
    out = objective.loss(replace(credited, tokens=replace(batch.tokens, policy=policy)))
    counts = {"rows": len(batch.scores), "tokens": int(batch.tokens.mask.sum())}
    loss = sum(t.weight * t.values.sum() / counts[t.unit] for t in out.terms)
    return loss.detach(), torch.autograd.grad(loss, policy)[0], out.metrics


@named
def test_padding_changes_nothing(objective):
    batch = rollout(objective)
    wide = replace(batch, tokens=batch.tokens.map(lambda t: pad(t, (0, 3))))
    loss, grad, _ = run(objective, batch)
    wide_loss, wide_grad, _ = run(objective, wide)
    torch.testing.assert_close(wide_loss, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(wide_grad, pad(grad, (0, 3)), atol=1e-12, rtol=0)
    assert (grad[~batch.tokens.mask] == 0).all()


@named
def test_what_stands_outside_the_mask_never_matters(objective):
    batch = rollout(objective)
    mask = batch.tokens.mask
    junk = batch.tokens.map(lambda t: torch.where(mask, t, 7.0) if t.is_floating_point() else t)
    loss, grad, _ = run(objective, batch)
    junk_loss, junk_grad, _ = run(objective, replace(batch, tokens=replace(junk, mask=mask)))
    torch.testing.assert_close(junk_loss, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(junk_grad, grad, atol=1e-12, rtol=0)


@named
def test_the_order_of_rows_changes_nothing(objective):
    batch = rollout(objective)
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    shuffled = RolloutBatch(batch.tokens.select(order), batch.scores[order], batch.groups[order])
    loss, grad, _ = run(objective, batch)
    other_loss, other_grad, _ = run(objective, shuffled)
    torch.testing.assert_close(other_loss, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(other_grad, grad[order], atol=1e-12, rtol=0)


@named
@pytest.mark.parametrize("drift", [50.0, 1e4])
def test_extreme_drift_stays_finite(objective, drift):
    loss, grad, metrics = run(objective, rollout(objective, drift=drift))
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(value.isfinite().all() for value in metrics.values())


@named
def test_metrics_say_which_kl_and_carry_no_gradient(objective):
    _, _, metrics = run(objective, rollout(objective))
    assert not any(value.requires_grad for value in metrics.values())
    kls = [name for name in metrics if "kl" in name]
    assert kls
    assert all(
        name.removeprefix("kl/").split("_")[0] in ("policy", "behavior", "reference")
        for name in kls
    ), kls


@named
def test_a_loss_before_credit_is_refused(objective):
    with pytest.raises(ConfigError, match=r"no advantages.*call the objective's `credit`"):
        objective.loss(rollout(objective))


def test_the_adaptive_coefficient_follows_the_kl_and_is_used_one_rollout_later():
    objective = KLPPO(beta=0.2, kl_target=1.0, kl_horizon=60.0, whiten_advantages=False)
    batch = rollout(objective)
    start = objective.init_state()
    credited, after = objective.credit(batch, start)
    fixed, unchanged = KLPPO(beta=0.2, whiten_advantages=False).credit(batch, start)
    torch.testing.assert_close(credited.advantages, fixed.advantages, atol=0, rtol=0)
    assert unchanged["beta"].item() == start["beta"].item() == pytest.approx(0.2)
    log_ratio = torch.where(batch.tokens.mask, batch.tokens.log_ratio, 0.0)
    err = max(-0.2, min(0.2, float(log_ratio.sum(-1).mean()) - 1))
    assert after["beta"].item() == pytest.approx(0.2 * (1 + err * 6 / 60), rel=1e-12)


def test_plans_ask_for_no_more_than_they_use():
    assert KLPPO().plan.values
    assert RPG().plan.statistics.keys() == {"kl"}
    assert RPG(anchor="behavior").plan.anchors == ()
    assert GRPO(beta=0).plan.anchors == ()
    assert GRPO().plan.anchors == ("reference",)
    assert RLOO(epochs=3, minibatches=2).plan.epochs == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLPPO(beta=0), "beta"),
        (lambda: KLPPO(beta=float("nan")), "beta"),
        (lambda: KLPPO(dual_clip=0.5), "dual_clip"),
        (lambda: RPG(beta=-1), "beta"),
        (lambda: RPG(divergence="forward_kl"), "needs its anchor's samples"),
        (lambda: RPG(betaa=1), "betaa"),
        (lambda: GRPO(beta=-0.1), "beta"),
        (lambda: GRPO(kl="k1"), "kl"),
        (lambda: RLOO(clip_low=0), "clip_low"),
    ],
)
def test_wrong_hyper_parameters_are_refused(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_aggregation_constant_needs_its_length():
    objective = GRPO(aggregation="constant")
    with pytest.raises(ConfigError, match=r"rollout\.max_new_tokens"):
        run(objective, rollout(objective))


def test_closed_forms_are_claimed_only_where_they_hold():
    reward, reference = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.2, 0.5, 0.3]).log()
    wanted = (reference + reward / 0.5).log_softmax(-1)
    for objective in (KLPPO(beta=0.5), RPG(beta=0.5), RLOO(beta=0.5)):
        torch.testing.assert_close(objective.optimum(reward, reference), wanted)
    for objective in (
        KLPPO(kl_target=3.0),
        KLPPO(kl_credit="token"),
        RPG(anchor="behavior"),
        RPG(baseline="mean"),
        GRPO(),
    ):
        assert objective.optimum(reward, reference) is None
