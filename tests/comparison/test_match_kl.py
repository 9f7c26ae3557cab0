"""The search for a KL, against curves whose answer is known."""

from math import exp, log

import pytest

from alignkit.comparison.match_kl import MOST_TRIES, TOLERANCE, Tried, next_step


def search(kl_of, starts, target, broken=lambda strength: ""):
    """Follow `next_step` on a curve: the last step, and the strengths that were tried for it."""

    def run(strength):
        return Tried(strength, kl_of(strength), broken(strength), bool(broken(strength)))

    tried = [run(start) for start in starts]
    while True:
        step = next_step(tried, target, len(tried) - len(starts))
        if step.strength is None:
            return step, [one.strength for one in tried[len(starts) :]]
        assert step.strength not in [one.strength for one in tried]
        tried.append(run(step.strength))


CURVES = {
    "second order": lambda beta: 0.8 / beta**2,
    "saturating": lambda beta: 6.0 * (1 - exp(-0.5 / beta**1.5)),
    "steep": lambda beta: exp(-3.5 * log(beta)),
    "logistic": lambda beta: 8.0 / (1 + (beta / 0.3) ** 1.8),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("starts", [[1.0], [0.1], [5.0], [0.3, 1.0]])
@pytest.mark.parametrize("target", [0.3, 0.6, 1.0, 2.0, 4.0])
def test_every_target_of_a_monotone_curve_is_reached(curve, starts, target):
    kl_of = CURVES[curve]
    step, tried = search(kl_of, starts, target)
    assert step.reached is not None, (step, tried)
    assert abs(step.reached.kl / target - 1) <= TOLERANCE
    assert step.reached.kl == kl_of(step.reached.strength)
    assert len(tried) <= MOST_TRIES


def test_the_second_order_law_is_hit_at_once():
    step, tried = search(lambda beta: 0.8 / beta**2, [1.0], 1.6)
    assert tried == [0.707]
    assert step.reached.strength == 0.707


def test_a_start_within_the_tolerance_needs_no_run():
    step, tried = search(lambda beta: 1 / beta, [1.0, 2.0], 0.55)
    assert (step.reached.strength, tried) == (2.0, [])


def test_a_broken_run_ends_the_search_and_is_never_bisected_on():
    """Its KL would be a fine end of a bracket; it is none."""

    def broken(strength):
        return "66 % of its mass is outside the grammar" if strength < 0.6 else ""

    step, tried = search(lambda beta: 0.9 / beta**1.7, [0.75, 1.0], 2.5, broken)
    assert step.problem == "66 % of its mass is outside the grammar"
    assert len(tried) == 1

    # The same from a grid that holds a broken run; a target before it is still found.
    kl_of = lambda beta: 0.9 / beta**1.7 if beta >= 0.6 else 100.0  # noqa: E731
    step, tried = search(kl_of, [0.5, 1.0, 2.0], 2.5, broken)
    assert (step.problem[:4], tried) == ("66 %", [0.548])
    step, tried = search(kl_of, [0.5, 1.0, 2.0], 1.2, broken)
    assert abs(step.reached.kl / 1.2 - 1) <= TOLERANCE
    assert min(tried) > 0.6


def test_a_search_that_begins_outside_the_grammar_goes_back_first():
    def broken(strength):
        return "it left" if strength < 0.9 else ""

    step, tried = search(lambda beta: 0.9 / beta**1.7, [0.3], 0.5, broken)
    assert tried[:2] == [0.6, 1.2]
    assert abs(step.reached.kl / 0.5 - 1) <= TOLERANCE

    step, tried = search(lambda beta: 1 / beta, [0.3], 0.5, lambda strength: "it left")
    assert (step.problem, len(tried)) == ("it left", MOST_TRIES)
    assert next_step([Tried(0.3, 0.0, "it crashed")], 0.5).problem == "it crashed"


def test_what_cannot_be_reached_is_said():
    step, tried = search(lambda beta: 0.9 / (1 + beta), [1.0, 2.0], 2.0)  # at most 0.9
    assert step.problem == "the nearest of its runs ends at 0.9 nats"
    assert len(tried) == MOST_TRIES

    def jump(beta):
        return 0.2 if beta > 0.5 else 3.0

    step, tried = search(jump, [0.1, 1.0], 1.0)
    assert step.problem.startswith("the nearest of its runs ends at")
    assert len(tried) == MOST_TRIES
    assert all(0.1 < strength < 1.0 for strength in tried)

    assert next_step([Tried(1.0, 0.0, "it failed")], 1.0).problem == "it failed"
    assert next_step([], 1.0).problem == "no run to begin from"
