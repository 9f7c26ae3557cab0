"""SPPO, RSPO, INPO, ONPO, online DPO, XPO and Nash-EMA: minimisers over an enumerated policy,
limits, and what each asks for.
"""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignkit import INPO, ONPO, RSPO, SPPO, XPO, NashEMA, NashMD, OnlineDPO
from alignkit.batches import Draw, GameBatch, TokenLogps
from alignkit.errors import ShapeError
from alignkit.losses import divergence_loss, dpo_loss, sppo_loss
from alignkit.objectives.base import Objective
from alignkit.oracles import regularized_nash
from alignkit.oracles.games import Game, random_games
from alignkit.oracles.self_play import multiplicative_weights, omd, online_dpo, onpo, rspo, xpo

F64 = torch.float64
N = 5


def game(beta: float) -> Game:
    games = random_games(1, N, beta, seed=7)
    return Game(games.preference[0], games.log_reference[0], beta)


def log_policy(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=F64).log_softmax(-1)


def gradient(
    objective: Objective,
    at: Tensor,
    preference: Tensor,
    sampler: Tensor,
    second_sampler: Tensor | None = None,
    **anchors: Tensor,
) -> Tensor:
    """Gradient in the logits, at log-probs `at` [n], of the expected loss on pairs of one-token
    completions, both from `sampler` or the second from another.
    """
    logits = at.clone().requires_grad_()
    first, second = (
        t.flatten() for t in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    )

    def tokens(index: Tensor) -> TokenLogps:
        held = {name: value[index].unsqueeze(-1) for name, value in anchors.items()}
        return TokenLogps(
            logits.log_softmax(-1)[index].unsqueeze(-1),
            held,
            torch.ones(N * N, 1, dtype=torch.bool),
        )

    batch = GameBatch([tokens(first), tokens(second)], preference[first, second].unsqueeze(-1))
    losses = torch.stack([term.weight * term.values for term in objective.loss(batch).terms]).sum(0)
    drawn = (
        sampler.exp().outer((sampler if second_sampler is None else second_sampler).exp()).flatten()
    )
    return torch.autograd.grad((drawn * losses).sum(), logits)[0]


def test_plans():
    assert SPPO().plan.samples == (Draw(None, source="target"),)
    assert SPPO().plan.feedback == "table"
    assert INPO().plan.samples == (Draw(2, source="target"),)
    assert OnlineDPO().plan.samples == (Draw(2),)
    assert XPO().plan.samples == (Draw(1), Draw(1, source="reference"))
    assert ONPO().plan.samples == (Draw(2, source="target"), Draw(1, source="previous"))
    assert RSPO().plan.samples == SPPO().plan.samples
    assert NashEMA().plan.samples == (Draw(1), Draw(1, source="target", scored=False))


def test_inpo_ends_at_the_mirror_step():
    played, target = game(0.2), log_policy(8)
    step = omd(played, target, None, 1 / 0.5)
    held = {"reference": played.log_reference, "target": target}
    objective = INPO(beta=0.2, step=0.5)
    assert gradient(objective, step, played.preference, target, **held).abs().max() < 1e-13
    assert gradient(objective, target, played.preference, target, **held).abs().max() > 1e-2


def test_a_step_of_inpo_is_wider_than_beta():
    with pytest.raises(ValidationError, match=r"step 0\.1 must be more than beta 0\.1"):
        INPO(beta=0.1, step=0.1)


def test_sppo_ends_near_multiplicative_weights():
    """Rock-paper-scissors from (0.6, 0.3, 0.1) with step 1; the paper's log Z = step / 2 leaves a
    known distance.
    """
    cycle = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], dtype=F64)
    target = torch.tensor([0.6, 0.3, 0.1], dtype=F64).log()
    logits = target.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=200,
        tolerance_grad=1e-14,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            target.exp() * sppo_loss(logits.log_softmax(-1), target, cycle @ target.exp(), step=1.0)
        ).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.tensor([0.65409, 0.23139, 0.11452], dtype=F64)
    torch.testing.assert_close(logits.detach().softmax(-1), expected, rtol=0, atol=6e-6)
    exact = multiplicative_weights(Game(cycle, target, 1.0), target, None, 1.0).exp()
    torch.testing.assert_close(
        exact, torch.tensor([0.65464, 0.23066, 0.11470], dtype=F64), rtol=0, atol=6e-6
    )


def test_sppo_is_the_mean_over_a_prompts_samples():
    noise = torch.Generator().manual_seed(1)
    draws = [-torch.rand(2, 3, 4, generator=noise, dtype=F64) for _ in range(3)]
    mask = torch.ones(3, 4, dtype=torch.bool)
    batch = GameBatch(
        [TokenLogps(p, {"target": t}, mask) for p, t in draws],
        torch.rand(3, 3, generator=noise, dtype=F64),
    )
    terms = SPPO(step=2.0).loss(batch).terms
    by_hand = [
        ((p - t).sum(-1) - 2.0 * (batch.preference[:, k] - 0.5)) ** 2
        for k, (p, t) in enumerate(draws)
    ]
    torch.testing.assert_close(sum(term.weight * term.values for term in terms), sum(by_hand) / 3)
    with pytest.raises(ShapeError, match="win_rate"):
        sppo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(3), step=1.0)


def test_onpo_ends_at_the_optimistic_step():
    played, target, previous = game(1.0), log_policy(8), log_policy(9)
    first, second, third = torch.cartesian_prod(*[torch.arange(N)] * 3).T
    weights = (target[first] + target[second] + previous[third]).exp()
    drawn = (first, second, third)
    table = torch.stack(
        [torch.stack([played.preference[i, j] for j in drawn], -1) for i in drawn], -2
    )

    def slope(at: Tensor) -> float:
        logits = at.clone().requires_grad_()

        def tokens(index: Tensor) -> TokenLogps:
            held = {"target": target[index, None], "previous": previous[index, None]}
            return TokenLogps(
                logits.log_softmax(-1)[index, None], held, torch.ones(N**3, 1, dtype=torch.bool)
            )

        (term,) = (
            ONPO(step=0.7).loss(GameBatch([tokens(i) for i in drawn], table.mean(-1), table)).terms
        )
        return float(torch.autograd.grad((weights * term.values).sum(), logits)[0].abs().max())

    assert slope(onpo(played, target, previous, 0.7)) < 1e-13
    # one plain step of multiplicative weights
    assert slope(onpo(played, target, target, 0.7)) > 1e-2


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "chi2"])
def test_rspo_follows_each_divergence_off_policy_too(name):
    """Value and gradient in the logits, samples of the target, against the exact divergence of
    policy and reference.
    """
    policy, target, reference = log_policy(1).requires_grad_(), log_policy(2), log_policy(3)
    exact = {
        "reverse_kl": lambda x: (x.exp() * (x - reference)).sum(),
        "forward_kl": lambda x: (reference.exp() * (reference - x)).sum(),
        "chi2": lambda x: ((x - reference).exp() - 1).square() @ reference.exp(),
    }[name](policy.log_softmax(-1))
    weights = dict.fromkeys(("reverse_kl", "forward_kl", "chi2"), 0.0) | {name: 1.0}
    sampled = target.exp() @ divergence_loss(policy.log_softmax(-1), target, reference, **weights)
    torch.testing.assert_close(sampled, exact, atol=1e-12, rtol=0)
    slopes = [torch.autograd.grad(value, policy)[0] for value in (sampled, exact)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


def rspo_gradient(objective: RSPO, at: Tensor, played: Game) -> Tensor:
    """Gradient in the logits of the expected loss on single samples, the target being the policy
    itself.
    """
    logits, mask = at.clone().requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
    held = [
        {"reference": played.log_reference[i].view(1, 1), "target": at[i].view(1, 1)}
        for i in range(N)
    ]
    drawn = [TokenLogps(logits.log_softmax(-1)[i].view(1, 1), held[i], mask) for i in range(N)]
    terms = objective.loss(GameBatch(drawn, played.win_rate(at).unsqueeze(0))).terms
    # of the completions, whose regressions come first, then their divergences
    chances = at.exp().repeat(2)
    expected = sum(
        N * term.weight * term.values.sum() * p for p, term in zip(chances, terms, strict=True)
    )
    return torch.autograd.grad(expected, logits)[0]


def test_rspo_with_the_reverse_kl_rests_at_the_equilibrium():
    """With a target that follows the policy: at beta = reverse_kl / (2 step), and at no other."""
    played = game(0.2)
    nash = regularized_nash(played.preference, played.log_reference.exp(), 0.2).log()
    assert rspo_gradient(RSPO(step=1.5, reverse_kl=0.6), nash, played).abs().max() < 1e-14
    assert rspo_gradient(RSPO(step=1.5, reverse_kl=0.3), nash, played).abs().max() > 1e-2


def test_the_tabular_updates_are_gradient_steps_on_the_objectives():
    played, at, rate = game(0.3), log_policy(6), 0.7
    held, pair = {"reference": played.log_reference}, (at, played.preference, at)
    slopes = {
        online_dpo: gradient(OnlineDPO(beta=0.3), *pair, **held),
        xpo: gradient(XPO(beta=0.3, alpha=0), *pair, played.log_reference, **held),
        rspo("reverse_kl"): rspo_gradient(RSPO(step=1, reverse_kl=0.6), at, played),
        rspo("forward_kl"): rspo_gradient(RSPO(step=1, reverse_kl=0, forward_kl=0.6), at, played),
        rspo("chi2"): rspo_gradient(RSPO(step=1, reverse_kl=0, chi2=0.6), at, played),
    }
    for update, slope in slopes.items():
        found = update(played, at, None, rate)
        torch.testing.assert_close(found, (at - rate * slope).log_softmax(-1), atol=1e-13, rtol=0)


def test_online_dpo_ends_at_the_optimum_of_a_bradley_terry_judge_only():
    beta, reward, reference = 0.5, log_policy(3), log_policy(4)
    optimum = (reference + reward / beta).log_softmax(-1)
    table = (reward.unsqueeze(1) - reward).sigmoid()
    assert (
        gradient(OnlineDPO(beta=beta), optimum, table, log_policy(5), reference=reference)
        .abs()
        .max()
        < 1e-14
    )
    played = game(beta)
    nash = regularized_nash(played.preference, played.log_reference.exp(), beta).log()
    assert (
        gradient(
            OnlineDPO(beta=beta), nash, played.preference, nash, reference=played.log_reference
        )
        .abs()
        .max()
        > 1e-3
    )


def two_completions() -> GameBatch:
    noise, mask = torch.Generator().manual_seed(2), torch.tensor([[True, True], [True, False]])
    draws = [
        torch.where(mask, -torch.rand(2, 2, 2, generator=noise, dtype=F64), 0.0) for _ in range(2)
    ]
    completions = [TokenLogps(p, {"reference": r, "target": r}, mask) for p, r in draws]
    return GameBatch(completions, torch.tensor([[1.0, 0.5], [0.25, 0.5]], dtype=F64))


def test_online_dpo_weighs_both_orders():
    batch = two_completions()
    first, second = ((t.sequence(), t.sequence("reference")) for t in batch.completions)
    wins = dpo_loss(first[0], second[0], first[1], second[1], beta=0.3)
    loses = dpo_loss(second[0], first[0], second[1], first[1], beta=0.3)
    (term,) = OnlineDPO(beta=0.3).loss(batch).terms
    torch.testing.assert_close(
        term.values, torch.stack([wins[0], 0.25 * wins[1] + 0.75 * loses[1]])
    )


def test_xpo_adds_optimism_about_what_the_reference_would_not_say():
    batch = two_completions()
    found = XPO(beta=0.3, alpha=0.1).loss(batch)
    dpo, optimism = found.terms
    torch.testing.assert_close(dpo.values, OnlineDPO(beta=0.3).loss(batch).terms[0].values)
    torch.testing.assert_close(
        optimism.weight * optimism.values, 0.1 * batch.completions[1].sequence()
    )
    own = batch.completions[0]
    # the other is not the policy's
    torch.testing.assert_close(found.metrics["kl"], own.sequence() - own.sequence("reference"))


def test_nash_ema_differs_from_nash_md_in_the_opponent_alone():
    full = two_completions()
    batch = GameBatch(full.completions[:1], full.preference[:, :1])
    ema, md = (objective(beta=0.3).loss(batch).terms[0].values for objective in (NashEMA, NashMD))
    assert torch.equal(ema, md)
