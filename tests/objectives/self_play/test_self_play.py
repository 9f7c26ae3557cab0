"""The squared self-play losses and their objectives against enumerated gradients, mirror steps and
proximal steps.
"""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from alignkit import EGPO, IPOMD, NashMD, NashMP, OnlineIPO
from alignkit.batches import Draw, GameBatch, TokenLogps
from alignkit.errors import ShapeError
from alignkit.losses import nash_md_loss, online_ipo_loss
from alignkit.objectives.self_play.nash_md import mixture_weights
from alignkit.oracles import regularized_nash
from alignkit.oracles.games import Game, random_games
from alignkit.oracles.self_play import gradient_to_mirror_step, omd

F64 = torch.float64


@pytest.mark.parametrize("ratio", [50.0, 1e4, -1e4])
def test_extreme_log_ratios_stay_finite_and_pull_back(ratio):
    policy = torch.tensor([[-1.0 - max(0.0, -ratio)]], requires_grad=True)
    reference = torch.tensor([[-1.0 - max(0.0, ratio)]])
    nash_md_loss(
        policy, reference, torch.tensor([0.5]), torch.tensor([[True]]), beta=0.1
    ).sum().backward()
    assert math.copysign(1, policy.grad.item()) == math.copysign(1, ratio)
    assert math.isfinite(policy.grad.item())
    first = policy.detach()[0].requires_grad_()
    zero = torch.zeros(1)
    online_ipo_loss(first, zero, reference[0], zero, zero, beta=0.1).sum().backward()
    assert math.copysign(1, first.grad.item()) == math.copysign(1, ratio)


def test_shapes_are_checked():
    two = torch.zeros(2)
    with pytest.raises(ShapeError, match="preference_gap"):
        online_ipo_loss(two, two, two, two, torch.zeros(3), beta=1.0)
    with pytest.raises(ShapeError, match=r"preference \[3\] with log-probs \[2, 4\]"):
        nash_md_loss(
            torch.zeros(2, 4),
            torch.zeros(2, 4),
            torch.zeros(3),
            torch.ones(2, 4, dtype=torch.bool),
            beta=1.0,
        )
    with pytest.raises(ShapeError, match="mask"):
        nash_md_loss(
            torch.zeros(2, 4), torch.zeros(2, 4), two, torch.ones(2, dtype=torch.bool), beta=1.0
        )


# ---------------------------------------------------------------- the squared loss: one-token
# sequences, all pairs


def all_pairs(
    log_policy: Tensor,
    log_reference: Tensor,
    gap: Tensor,
    beta: float,
    weights: Tensor | None = None,
) -> Tensor:
    """online_ipo_loss over all n x n ordered pairs, weighted by q q^T (uniform when left out): a
    scalar.
    """
    n = len(log_policy)
    first, second = (
        t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    )
    losses = online_ipo_loss(
        log_policy[first],
        log_policy[second],
        log_reference[first],
        log_reference[second],
        gap.flatten(),
        beta=beta,
    )
    return losses.mean() if weights is None else (weights.outer(weights).flatten() * losses).sum()


def one_game(n: int, beta: float, seed: int) -> Game:
    games = random_games(1, n, beta, seed=seed)
    return Game(games.preference[0], games.log_reference[0], beta)


def random_logits(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_()


def win_gap(game: Game, log_opponent: Tensor) -> Tensor:
    win_rate = game.win_rate(log_opponent)
    return win_rate.unsqueeze(-1) - win_rate.unsqueeze(-2)


def test_squared_loss_by_hand():
    got = online_ipo_loss(
        *torch.tensor([[-1.0], [-3.0], [-2.0], [-2.5]]), torch.tensor([0.2]), beta=0.1
    )
    assert got.tolist() == pytest.approx([(1.0 + 0.5 - 2.0) ** 2])


def test_soft_preference_is_the_expectation_over_hard_labels():
    margin, p, beta = torch.tensor([0.3, -1.2], dtype=F64), torch.tensor([0.7, 0.4], dtype=F64), 0.2
    zero = torch.zeros_like(margin)
    soft, win, lose = (
        online_ipo_loss(margin, zero, zero, zero, gap, beta=beta)
        for gap in (p - 0.5, zero + 0.5, zero - 0.5)
    )
    constant = (0.25 - (p - 0.5) ** 2) / beta**2
    torch.testing.assert_close(p * win + (1 - p) * lose, soft + constant, rtol=1e-13, atol=0)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_gradient_descent_on_uniform_pairs_is_the_mirror_step(beta):
    n, rate = 6, 0.05
    game, logits = one_game(n, beta, 1), random_logits(n, 2)
    gap = win_gap(game, logits.detach().log_softmax(-1))
    (gradient,) = torch.autograd.grad(
        all_pairs(logits.log_softmax(-1), game.log_reference, gap, beta), logits
    )
    moved = (logits - rate * gradient).detach().log_softmax(-1)
    expected = omd(
        game, logits.detach().log_softmax(-1), None, gradient_to_mirror_step(rate, beta, n)
    )
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_online_ipo_is_self_play_policy_gradient(beta):
    """grad of the squared loss on pairs of the policy = (4 / beta) x the gradient of Nash-MD
    without a mixture.
    """
    game, logits = one_game(5, beta, 3), random_logits(5, 4)
    log_policy = logits.log_softmax(-1)
    q = log_policy.detach().exp()
    squared = all_pairs(log_policy, game.log_reference, game.preference - 0.5, beta, weights=q)
    ones = torch.ones(5, 1, dtype=torch.bool)
    surrogate = nash_md_loss(
        log_policy.unsqueeze(-1),
        game.log_reference.unsqueeze(-1),
        game.win_rate(q.log()),
        ones,
        beta=beta,
    )
    (left,) = torch.autograd.grad(squared, logits, retain_graph=True)
    (right,) = torch.autograd.grad((q * surrogate).sum(), logits)
    torch.testing.assert_close(left, 4 / beta * right, rtol=0, atol=1e-12)


def test_ipo_md_is_a_policy_gradient_only_with_a_baseline():
    beta, mixture = 0.3, 0.4
    game, logits = one_game(5, beta, 5), random_logits(5, 6)
    log_policy = logits.log_softmax(-1)
    q = ((1 - mixture) * log_policy.detach() + mixture * game.log_reference).softmax(-1)
    squared = all_pairs(log_policy, game.log_reference, game.preference - 0.5, beta, weights=q)
    bracket = game.win_rate(q.log()) - 0.5 - beta * (log_policy.detach() - game.log_reference)
    (left,) = torch.autograd.grad(squared, logits, retain_graph=True)
    errors = []
    for baseline in (q @ bracket, 0.0):
        (right,) = torch.autograd.grad(
            -(q * (bracket - baseline) * log_policy).sum(), logits, retain_graph=True
        )
        errors.append(float((left - 4 / beta * right).abs().max()))
    assert errors[0] < 1e-13
    assert errors[1] > 1e-3


# ---------------------------------------------------------------- objectives: what they ask for,
# what they do with it


def game_batch(k: int, target: bool = False) -> GameBatch:
    generator = torch.Generator().manual_seed(k)

    def draw() -> Tensor:
        return -torch.rand(3, 4, generator=generator, dtype=F64)

    completions = []
    for i in range(k):
        mask = torch.arange(4) < torch.tensor([[4], [2], [3 - i]])
        anchors = {"reference": draw()} | ({"target": draw()} if target else {})
        completions.append(
            TokenLogps(draw(), anchors, mask).map(
                lambda t, m=mask: torch.where(m, t, t.new_zeros(()))
            )
        )
    return GameBatch(completions, torch.rand(3, k, generator=generator, dtype=F64))


def sums(batch: GameBatch, name: str) -> list[Tensor]:
    return [tokens.sequence(name) for tokens in batch.completions]


def test_plans():
    assert NashMD(mixture=0.3).plan.samples == (
        Draw(1),
        Draw(1, weights=mixture_weights(0.3), scored=False),
    )
    assert OnlineIPO().plan.samples == NashMP().plan.samples == (Draw(2),)
    assert IPOMD(mixture=0.3).plan.samples == (Draw(2, weights=mixture_weights(0.3)),)
    assert EGPO().plan.samples == (Draw(2), Draw(1, scored=False))
    assert [o().plan.update for o in (NashMD, OnlineIPO, IPOMD, NashMP, EGPO)] == [
        "gradient"
    ] * 4 + ["extragradient"]
    assert NashMP().plan.anchors == ("reference", "target")
    assert all(
        o().plan.data == "game" and o().plan.feedback == "pairwise"
        for o in (NashMD, OnlineIPO, IPOMD, NashMP, EGPO)
    )


def test_nash_md_terms():
    batch = game_batch(1)
    (term,) = (found := NashMD(beta=0.3).loss(batch)).terms
    tokens = batch.completions[0]
    expected = nash_md_loss(
        tokens.policy, tokens.reference, batch.preference[:, 0], tokens.mask, beta=0.3
    )
    assert term.unit == "rows"
    torch.testing.assert_close(term.values, expected)
    torch.testing.assert_close(
        found.metrics["kl"], tokens.sequence() - tokens.sequence("reference")
    )


def test_online_ipo_and_egpo_differ_in_the_gap_only():
    batch = game_batch(2)
    logps = (*sums(batch, "policy"), *sums(batch, "reference"))
    preference = batch.preference
    for objective, gap in (
        (OnlineIPO, preference[:, 0] - 0.5),
        (EGPO, preference[:, 0] - preference[:, 1]),
    ):
        found = objective(beta=0.3).loss(batch)
        torch.testing.assert_close(found.terms[0].values, online_ipo_loss(*logps, gap, beta=0.3))
        assert "kl" in found.metrics
    assert "kl" not in IPOMD().loss(batch).metrics  # its samples are not the policy's
    assert "kl" in IPOMD(mixture=0).loss(batch).metrics


def test_mean_form_divides_each_completion_by_its_length():
    batch = game_batch(2)
    lengths = [tokens.lengths for tokens in batch.completions]
    logps = [
        total / n
        for name in ("policy", "reference")
        for total, n in zip(sums(batch, name), lengths)
    ]
    expected = online_ipo_loss(*logps, batch.preference[:, 0] - 0.5, beta=0.3)
    torch.testing.assert_close(
        OnlineIPO(beta=0.3, form="mean").loss(batch).terms[0].values, expected
    )


def test_nash_mp_is_held_to_reference_and_target():
    batch, beta, eta = game_batch(2, target=True), 0.3, 0.5
    anchors = [
        (eta * r + t) / (1 + eta) for r, t in zip(sums(batch, "reference"), sums(batch, "target"))
    ]
    expected = online_ipo_loss(
        *sums(batch, "policy"), *anchors, batch.preference[:, 0] - 0.5, beta=beta * (1 + eta) / eta
    )
    torch.testing.assert_close(NashMP(beta=beta, eta=eta).loss(batch).terms[0].values, expected)
    without_target = NashMP(beta=beta, eta=1e12).loss(batch).terms[0].values
    torch.testing.assert_close(without_target, OnlineIPO(beta=beta).loss(batch).terms[0].values)


def test_nash_mp_with_a_frozen_target_is_one_proximal_step():
    """Its stationary point maximises P(pi > pi') - beta KL(pi || ref) - (beta / eta) KL(pi ||
    target) against itself, and is nearer to the equilibrium than the target by 1 / (1 + eta).
    """
    beta, eta = 0.2, 0.7
    game, target = one_game(5, beta, 7), random_logits(5, 8).detach().log_softmax(-1)
    objective = NashMP(beta=beta, eta=eta)
    blend = ((eta * game.log_reference + target) / (1 + eta)).softmax(-1)
    step = regularized_nash(game.preference, blend, beta * (1 + 1 / eta)).log()
    logits = step.clone().requires_grad_()
    first, second = (
        t.flatten() for t in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    )

    def tokens(index: Tensor) -> TokenLogps:
        anchors = {
            "reference": game.log_reference[index].unsqueeze(-1),
            "target": target[index].unsqueeze(-1),
        }
        return TokenLogps(
            logits.log_softmax(-1)[index].unsqueeze(-1),
            anchors,
            torch.ones(25, 1, dtype=torch.bool),
        )

    losses = (
        objective.loss(
            GameBatch([tokens(first), tokens(second)], game.preference[first, second].unsqueeze(-1))
        )
        .terms[0]
        .values
    )
    weights = (step.exp().outer(step.exp())).flatten()
    (gradient,) = torch.autograd.grad((weights * losses).sum(), logits)
    assert gradient.abs().max() < 1e-12
    nash = regularized_nash(game.preference, game.log_reference.exp(), beta)
    before, after = ((nash * (nash.log() - other)).sum() for other in (target, step))
    assert after < before / (1 + eta)


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        (NashMD, {"mixture": 1.1}),
        (IPOMD, {"mixture": -0.1}),
        (EGPO, {"beta": 0}),
        (NashMP, {"eta": math.nan}),
        (EGPO, {"mix": 1}),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(objective, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        objective(**fields)
