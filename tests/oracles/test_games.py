"""Exact games: the equilibrium against closed forms, known figures and a second solver; the
algorithms against their theory.
"""

import math

import pytest
import torch
from scipy.optimize import minimize

from alignkit.errors import ConfigError, ShapeError
from alignkit.oracles import duality_gap, regularized_nash
from alignkit.oracles.games import (
    Game,
    best_response,
    best_response_value,
    game_value,
    random_games,
)
from alignkit.oracles.self_play import (
    ALGORITHMS,
    Algorithm,
    egpo,
    ipo_md,
    nash_md,
    omd,
    prox_to_mirror_step,
    sequence_mixture,
    trajectory,
)

F64 = torch.float64
RPS = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], dtype=F64)
UNIFORM = torch.full((3,), 1 / 3, dtype=F64)
SKEWED = torch.tensor([0.6, 0.3, 0.1], dtype=F64)


def kl(log_p, log_q):
    d = log_p - log_q
    return (log_p.exp() * (d + torch.expm1(-d))).sum(-1)


def nash(games):
    """Log-probs of the equilibria of a stack of games, [G, n]."""
    rows = zip(games.preference, games.log_reference)
    return torch.stack([regularized_nash(p, r.exp(), games.beta).log() for p, r in rows])


def constant_residual(values):
    return (values - values.mean(-1, keepdim=True)).abs().max()


# ---------------------------------------------------------------- solutions


@pytest.mark.parametrize(("beta", "share"), [(1.0, 0.54983), (0.1, 0.88080)])
def test_two_actions_closed_form(beta, share):
    preference = torch.tensor([[0.5, 0.7], [0.3, 0.5]], dtype=F64)
    reference = torch.tensor([0.5, 0.5], dtype=F64)
    got = regularized_nash(preference, reference, beta)
    assert math.isclose(float(got[0]), share, abs_tol=5e-6)
    assert math.isclose(float(got[0] / got[1]), math.exp(0.2 / beta), rel_tol=1e-12)


def test_rock_paper_scissors():
    for beta in (1.0, 0.1, 0.001):
        torch.testing.assert_close(
            regularized_nash(RPS, UNIFORM, beta), UNIFORM, rtol=0, atol=1e-13
        )
    expected = torch.tensor([0.4320653244, 0.2303293113, 0.3376053641], dtype=F64)
    torch.testing.assert_close(regularized_nash(RPS, SKEWED, 0.1), expected, rtol=0, atol=1e-10)


def test_cold_limit_of_a_cycle():
    """With advantages a, b, c along a cycle of three the game without the KL has the equilibrium
    (b, c, a) / (a + b + c); the regularised one nears it in proportion to beta.
    """
    a, b, c = 0.35 / 3, 0.575 / 3, 0.5 / 3
    advantage = torch.tensor([[0, a, -c], [-a, 0, b], [c, -b, 0]], dtype=F64)
    limit = torch.tensor([b, c, a], dtype=F64) / (a + b + c)
    error = [regularized_nash(0.5 + advantage, SKEWED, beta) - limit for beta in (2e-4, 1e-4)]
    assert error[0].abs().max() < 2e-3
    torch.testing.assert_close(
        error[0] / error[1], torch.full((3,), 2.0, dtype=F64), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01, 0.002])
def test_fixed_point_residual_and_zero_gap(beta):
    games = random_games(10, 10, beta, seed=1)
    log_nash = nash(games)
    equation = log_nash - games.log_reference - games.win_rate(log_nash) / beta
    assert constant_residual(equation) < 1e-10
    assert games.gap(log_nash).max() < 1e-17


def test_a_temperature_at_which_probabilities_underflow():
    games = random_games(10, 10, 1e-4, seed=1)
    log_nash = nash(games)
    assert (log_nash == -math.inf).any()
    assert games.gap(log_nash).max() < 1e-17


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.03])
def test_convex_minimisation_finds_the_same_equilibrium(beta):
    games = random_games(3, 6, beta, seed=2)
    for preference, log_reference in zip(games.preference, games.log_reference):

        def objective(x, preference=preference, log_reference=log_reference):
            logits = torch.tensor(x, requires_grad=True)
            value = best_response_value(preference, log_reference.exp(), logits.softmax(-1), beta)
            value.backward()
            return value.item(), logits.grad.numpy()

        found = minimize(
            objective, log_reference.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        exact = regularized_nash(preference, log_reference.exp(), beta)
        assert math.isclose(found.fun, 0.5, abs_tol=1e-9)
        torch.testing.assert_close(torch.tensor(found.x).softmax(-1), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antisymmetric", [True, False])
def test_gap_equals_the_difference_of_two_best_responses(antisymmetric):
    games = random_games(20, 8, 0.1, seed=3)
    reference, policy = games.log_reference.exp(), games.log_reference.flip(0).exp()
    # a judge that prefers the second position
    preference = games.preference if antisymmetric else games.preference**1.3
    row = best_response(preference, reference, policy, 0.1)
    column = best_response(1 - preference.mT, reference, policy, 0.1)
    direct = game_value(preference, reference, row, policy, 0.1) - game_value(
        preference, reference, policy, column, 0.1
    )
    gap = duality_gap(preference, reference, policy, 0.1)
    assert (gap - direct).abs().max() < 1e-12
    if antisymmetric:
        assert (gap - 0.2 * kl(policy.log(), row.log())).abs().max() < 1e-12
        assert (gap >= 0.2 * kl(policy.log(), nash(games))).all()
        assert ((game_value(preference, reference, policy, policy, 0.1) - 0.5).abs() < 1e-14).all()


def test_policies_without_full_support():
    sure = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    row = best_response(RPS, UNIFORM, sure, 0.5)
    assert math.isclose(
        float(duality_gap(RPS, UNIFORM, sure, 0.5)), -float(row[0].log()), rel_tol=1e-12
    )
    assert duality_gap(RPS, torch.tensor([0.0, 0.5, 0.5]), sure, 0.5) == math.inf


def test_what_is_not_a_game_is_refused():
    with pytest.raises(ConfigError, match="beta must be a positive number, got 0"):
        regularized_nash(RPS, UNIFORM, 0)
    with pytest.raises(ConfigError, match="beta"):
        duality_gap(RPS, UNIFORM, UNIFORM, math.nan)
    with pytest.raises(ConfigError, match=r"off by 2\.0e-01; use"):
        regularized_nash((RPS + 0.1).clamp(max=1), UNIFORM, 1.0)
    with pytest.raises(ConfigError, match="positive probability"):
        regularized_nash(RPS, torch.tensor([0.5, 0.5, 0.0]), 1.0)
    with pytest.raises(ConfigError, match="sum to 1"):
        duality_gap(RPS, UNIFORM, UNIFORM.log(), 1.0)
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        duality_gap(RPS - 0.5, UNIFORM, UNIFORM, 1.0)
    with pytest.raises(ShapeError, match=r"\[3, 3\], \[2\]"):
        regularized_nash(RPS, torch.tensor([0.5, 0.5]), 1.0)
    with pytest.raises(ShapeError, match="one game at a time"):
        regularized_nash(RPS.expand(2, 3, 3), UNIFORM, 1.0)


# ---------------------------------------------------------------- algorithms


@pytest.mark.parametrize("prox_step", [0.02, 0.2, 3.0])
def test_nash_mp_is_egpo_in_another_parametrisation(prox_step):
    games = random_games(5, 6, 0.1, seed=4)
    mp = trajectory(games, ALGORITHMS["nash_mp"], prox_step, 60)
    extragradient = trajectory(games, ALGORITHMS["egpo"], prox_to_mirror_step(prox_step, 0.1), 60)
    torch.testing.assert_close(mp, extragradient, rtol=0, atol=1e-11)
    assert math.isclose(prox_to_mirror_step(2 * 0.1, 0.1), 2 / (1 + 2 * 0.1))


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(
    "step", [lambda b: 1 / (b + 3), lambda b: 2 / (1 + 2 * b)], ids=["theorem", "nash_mp"]
)
def test_egpo_contracts_in_every_iteration(beta, step):
    games = random_games(20, 10, beta, seed=5)
    distance = kl(nash(games), trajectory(games, ALGORITHMS["egpo"], step(beta), 400))
    measurable = distance[:-1] > 1e-22
    assert measurable[0].all()
    assert (distance[1:] <= (1 - step(beta) * beta) * distance[:-1] * (1 + 1e-9))[measurable].all()


def test_egpo_can_diverge_at_twice_the_largest_step():
    beta = 0.01
    start = (UNIFORM.log() + 1e-4 * torch.tensor([1.0, -2.0, 1.0], dtype=F64)).log_softmax(-1)
    for step, shrinks in ((2 / (1 + 2 * beta), True), (4 / (1 + 4 * beta), False)):
        distance = kl(
            UNIFORM.log(),
            trajectory(Game(RPS, UNIFORM.log(), beta), ALGORITHMS["egpo"], step, 40, start),
        )
        assert bool((distance[1:] < distance[:-1]).all()) == shrinks


def test_nash_mp_rate():
    beta = 0.1
    games = random_games(20, 10, beta, seed=6)
    distance = kl(nash(games), trajectory(games, ALGORITHMS["nash_mp"], 2 * beta, 160))
    k = torch.arange(len(distance), dtype=F64).unsqueeze(-1)
    assert (distance <= distance[0] * (1 + 2 * beta) ** -k * (1 + 1e-9)).all()


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nash_md_schedule_keeps_its_bounds(beta):
    games = random_games(20, 10, beta, seed=7)
    log_nash = nash(games)
    iterates = trajectory(games, ALGORITHMS["nash_md"], lambda t: 2 / (beta * (t + 2)), 300)
    first = best_response(
        games.preference, games.log_reference.exp(), games.log_reference.exp(), beta
    )
    # the first mixture is the reference
    torch.testing.assert_close(iterates[1].exp(), first, rtol=0, atol=1e-13)
    distance = kl(log_nash, iterates)
    t = torch.arange(len(distance), dtype=F64).unsqueeze(-1)
    assert (distance <= 8 / (beta**2 * (t + 1))).all()
    step = 2 / (beta * (t[:-1] + 2))
    assert (distance[1:] <= (1 - step * beta) * distance[:-1] + 2 * step**2).all()


@pytest.mark.parametrize("method", ["nash_md", "ipo_md"])
def test_a_constant_mixture_has_the_limit_of_a_warmer_game(method):
    beta, weight = 0.5, 0.2
    games = random_games(5, 6, beta, seed=8)
    algorithm, step = (
        (ALGORITHMS["nash_md"], weight / beta)
        if method == "nash_md"
        else (Algorithm(ipo_md(weight)), 0.5)
    )
    limit = trajectory(games, algorithm, step, 3000)[-1]
    mixture = sequence_mixture(games, limit, weight)
    assert constant_residual(limit - games.log_reference - games.win_rate(mixture) / beta) < 1e-12
    warmer = Game(games.preference, games.log_reference, beta / (1 - weight))
    torch.testing.assert_close(mixture.exp(), nash(warmer).exp(), rtol=0, atol=1e-12)
    assert (games.gap(limit) > 1e-7).all()  # and so its own gap has a floor


@pytest.mark.parametrize("beta", [0.1, 0.01])
def test_rock_paper_scissors_linearised_modulus(beta):
    step, omega = 0.2, math.sqrt(3) / 6
    game = Game(RPS, UNIFORM.log(), beta)
    start = (UNIFORM.log() + 1e-7 * torch.tensor([1.0, -2.0, 1.0], dtype=F64)).log_softmax(-1)
    shrink, turn = 1 - step * beta, 1j * step * omega
    predicted = {
        "omd": shrink + turn,
        "nash_md": shrink * (1 + turn),
        "egpo": shrink + turn * (shrink + turn),
    }
    for name, factor in predicted.items():
        iterates = trajectory(game, ALGORITHMS[name], step, 20 * ALGORITHMS[name].queries, start)
        size = constant_free_norm(iterates)
        measured = float((size[20] / size[0]) ** (1 / 20))
        assert math.isclose(measured, abs(factor), rel_tol=1e-5), name


def constant_free_norm(log_policies):
    return (log_policies - log_policies.mean(-1, keepdim=True)).norm(dim=-1)


@pytest.mark.parametrize(("beta", "largest"), [(0.1, 2.143), (0.01, 0.2397)])
def test_mirror_descent_is_stable_below_its_largest_step_only(beta, largest):
    assert math.isclose(largest, 2 * beta / (beta**2 + 1 / 12), rel_tol=1e-3)
    game = Game(RPS, UNIFORM.log(), beta)
    start = (UNIFORM.log() + torch.tensor([1e-3, -2e-3, 1e-3], dtype=F64)).log_softmax(-1)
    for factor, stable in ((0.95, True), (1.05, False)):
        size = constant_free_norm(
            trajectory(game, ALGORITHMS["omd"], factor * largest, 2000, start)
        )
        assert bool(size[-1] < size[0]) == stable


@pytest.mark.parametrize(
    "name", ["omd", "online_ipo", "egpo", "nash_mp", "inpo", "nash_ema", "rspo"]
)
def test_unbiased_algorithms_end_at_the_equilibrium(name):
    beta = 0.5
    games = random_games(5, 5, beta, seed=9)
    step = {"inpo": 2.0, "online_ipo": 0.3, "rspo": 1.0}.get(name, 0.5)
    last = trajectory(games, ALGORITHMS[name], step, 4000)[-1]
    torch.testing.assert_close(last.exp(), nash(games).exp(), rtol=0, atol=1e-12)


def test_egpo_beats_the_others_by_a_thousand_at_equal_questions():
    beta, questions = 0.01, 1000
    games = random_games(10, 10, beta, seed=0)
    # 500 iterations
    best = games.gap(trajectory(games, ALGORITHMS["egpo"], 2 / (1 + 2 * beta), questions)[-1])
    grid = torch.logspace(-2, 2, 25, dtype=F64)
    grid = grid[grid * beta <= 1].reshape(-1, 1, 1)  # at step beta = 1 the mixture is the reference
    for name in ("omd", "nash_md"):
        gaps = games.gap(trajectory(games, ALGORITHMS[name], grid, questions)[-1])  # [steps, games]
        tuned = gaps.nan_to_num(nan=math.inf).amin(0)  # each game may choose its own step
        assert (tuned / best).median() > 1000, name
    decaying = games.gap(
        trajectory(games, ALGORITHMS["nash_md"], lambda t: 2 / (beta * (t + 2)), questions)[-1]
    )
    assert (decaying / best).median() > 1000


def test_no_winner_on_transitive_games():
    """The control: on Bradley-Terry games the three algorithms are alike, so the advantage above is
    about cycles.
    """
    beta, n = 0.1, 10
    scores = torch.randn(10, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    games = Game(
        (scores.unsqueeze(-1) - scores.unsqueeze(-2)).sigmoid(),
        random_games(10, n, beta).log_reference,
        beta,
    )
    # equal iterations
    gaps = [
        games.gap(trajectory(games, Algorithm(update), 0.3, 100))[10:]
        for update in (omd, nash_md, egpo)
    ]
    for other in gaps[:2]:
        assert ((other / gaps[2] - 1).abs() < 0.25).all()  # against factors of a million above


def test_averages_of_optimistic_and_plain_multiplicative_weights():
    """Rock-paper-scissors from a skewed start, step 0.5, gap 2 max P pi - 1 of the game without the
    KL.
    """
    game = Game(RPS, SKEWED.log(), 1.0)

    def gap(policies):
        return float(2 * (RPS @ policies).max() - 1)

    mwu = trajectory(game, ALGORITHMS["sppo"], 0.5, 1000).exp()
    onpo = trajectory(game, ALGORITHMS["onpo"], 0.5, 1000).exp()
    for iterates, expected in ((mwu, (5.8e-2, 1.8e-2)), (onpo, (3.5e-2, 3.9e-3))):
        averages = [gap(iterates[:t].mean(0)) for t in (100, 1000)]
        assert averages == pytest.approx(expected, rel=0.02)
    # as 1 / T
    assert gap(onpo[:500].mean(0)) / gap(onpo[:1000].mean(0)) == pytest.approx(2, rel=0.05)
    assert gap(mwu[:500].mean(0)) / gap(mwu[:1000].mean(0)) < 1.6  # as 1 / sqrt(T), and up and down
    assert gap(onpo[1000]) == pytest.approx(1.4e-5, rel=0.04)  # its last iterate arrives
    assert gap(mwu[1000]) == pytest.approx(0.82, abs=0.005)  # that of plain weights cycles outwards
