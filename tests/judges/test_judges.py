"""Judges: exact antisymmetry, no position bias, invalid answers are never wins, an endpoint that
misbehaves in every way.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ConfigError, DataError, NumericsError, ResourceError
from alignkit.judges import BothOrders, BradleyTerry, as_trl_judge, from_trl_judge, load_judge

PROMPTS, FIRST, SECOND = ["p", "q", "r"], ["a", "b", "c"], ["d", "e", "c"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_antisymmetry_is_exact(answers):
    """Whatever the two orders say, P(a, b) + P(b, a) is 1 to the last bit."""
    table = {}
    for i, (one, other) in enumerate(answers):
        table[f"a{i}", f"b{i}"], table[f"b{i}", f"a{i}"] = one, other
    judge = BothOrders(lambda prompts, first, second: [table[pair] for pair in zip(first, second)])
    n = len(answers)
    a, b = [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)]
    forward, backward = judge(["p"] * n, a, b), judge(["p"] * n, b, a)
    assert forward.valid.all()
    assert torch.equal(
        forward.probability + backward.probability, torch.ones(n, dtype=torch.float64)
    )
    expected = torch.tensor([(one + 1 - other) / 2 for one, other in answers], dtype=torch.float64)
    torch.testing.assert_close(forward.probability, expected, rtol=0, atol=3e-16)


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(-50, 50), st.sampled_from([0.0, 0.1, 1.0, 30.0]))
def test_bradley_terry_is_the_sigmoid_and_exactly_antisymmetric(one, other, temperature):
    rewards = {"a": one, "b": other}
    judge = BradleyTerry(
        lambda prompts, completions: [rewards[c] for c in completions], temperature=temperature
    )
    p, q = judge(["p"], ["a"], ["b"]).probability, judge(["p"], ["b"], ["a"]).probability
    assert p + q == 1
    if temperature:
        torch.testing.assert_close(
            p, torch.tensor([(one - other) / temperature]).double().sigmoid(), rtol=0, atol=1e-6
        )
    else:
        assert p == (0.5 if one == other else float(one > other))


@pytest.mark.parametrize("bias", [0.0, 0.3, 1.0])
def test_a_pure_position_bias_gives_exactly_one_half(bias):
    verdict = BothOrders(lambda prompts, first, second: [bias] * len(first))(PROMPTS, FIRST, SECOND)
    assert verdict.probability.tolist() == [0.5] * 3
    one_order = BothOrders(lambda p, a, b: [bias] * len(a), symmetrise=False)(
        PROMPTS, FIRST, SECOND
    )
    assert float(one_order.probability[0]) == pytest.approx(bias, abs=1e-15)


def test_a_text_against_itself_is_a_tie_that_nobody_is_asked_about():
    asked = []

    def ask(prompts, first, second):
        asked.extend(zip(prompts, first, second))
        return [0.9 if a < b else 0.2 for a, b in zip(first, second)]

    verdict = BothOrders(ask)(PROMPTS, FIRST, SECOND)
    assert verdict.probability.tolist() == pytest.approx([0.85, 0.85, 0.5])
    assert verdict.probability[2] == 0.5
    assert sorted(asked) == [("p", "a", "d"), ("p", "d", "a"), ("q", "b", "e"), ("q", "e", "b")]
    assert (
        BradleyTerry(lambda p, c: [torch.rand(()).item() for _ in c])(
            ["p"], ["x"], ["x"]
        ).probability
        == 0.5
    )


@pytest.mark.parametrize(
    "answer", [-1, "maybe", "", None, float("nan"), 1.5, float("inf"), [1.0], "1.0", 10**400]
)
def test_an_answer_that_is_no_probability_is_invalid_and_no_win(answer):
    def ask(prompts, first, second):
        # one of the two orders only
        return [answer if (p, a) == ("p", "a") else 1.0 for p, a in zip(prompts, first)]

    judge = BothOrders(ask)
    verdict = judge(PROMPTS, FIRST, SECOND)
    assert verdict.valid.tolist() == [False, True, True]
    assert verdict.probability[0] == 0.5
    assert judge.metrics["judge/invalid"] == pytest.approx(1 / 3)


def test_rewards_that_do_not_apply_or_are_not_finite():
    missing = BradleyTerry(lambda p, c: [None if text == "d" else 1.0 for text in c])
    assert missing(PROMPTS, FIRST, SECOND).valid.tolist() == [False, True, True]
    assert missing.metrics["judge/invalid"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"judge.temperature: -1"):
        BradleyTerry(lambda p, c: [], temperature=-1)


FILE = """
import signal, time
def alarmed(prompts, first, second):
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return [1.0] * len(first)
class Alarmed:
    def judge(self, prompts, completions, shuffle_order=True):
        return [1 - int(x) for x in alarmed(prompts, *zip(*completions))]
def better(prompts, first, second): return [float(len(a) > len(b)) for a, b in zip(first, second)]
def scalar(prompts, first, second): return 0.5
def short(prompts, first, second): return [0.5]
def text(prompts, first, second): return "first"
def raises(prompts, first, second): raise KeyError("x")
def hangs(prompts, first, second): time.sleep(60)
def nans(prompts, completions, **kwargs): return [float("nan") for _ in completions]
class Old:
    def judge(self, prompts, completions, shuffle_order=True):
        assert not shuffle_order
        return [-1 if "?" in a + b else int(len(b) > len(a)) for a, b in completions]
number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(FILE)
    return path


def test_judges_of_the_section(file, caplog):
    assert (
        load_judge({"function": f"{file}:better"}, safe=False)(["p"], ["long"], ["no"]).probability
        == 1
    )
    assert f"judge.function runs code from {file}:better" in caplog.text
    old = load_judge({"trl": f"{file}:Old"}, safe=False)(["p", "p"], ["long", "?"], ["no", "no"])
    assert (old.probability.tolist(), old.valid.tolist()) == ([1, 0.5], [True, False])
    terry = load_judge({"rewards": [{"format": "a+"}], "temperature": 0}, safe=True)
    assert terry(["p"] * 3, ["a", "b", "aa"], ["b", "a", "a"]).probability.tolist() == [1, 0, 0.5]
    with pytest.raises(NumericsError, match="nans returned nan"):
        load_judge({"rewards": [{"function": f"{file}:nans"}]}, safe=False)(["p"], ["a"], ["b"])


@pytest.mark.parametrize("section", [{"function": "alarmed"}, {"trl": "Alarmed"}])
def test_a_judge_may_set_signals(file, section):
    """Libraries put timeouts of their own around each answer (`signal.alarm`)."""
    ((kind, name),) = section.items()
    judge = load_judge({kind: f"{file}:{name}", "both_orders": False}, safe=False)
    assert judge(["p"], ["a"], ["b"]).probability.tolist() == [1.0]
    with ThreadPoolExecutor(1) as elsewhere:
        future = elsewhere.submit(judge, ["p"], ["a"], ["b"])
        with pytest.raises(DataError, match=rf"judge {name} sets a signal .* main thread"):
            future.result()


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"function": "scalar"}, DataError, r"scalar returned a float for 4 queries"),
        ({"function": "short"}, DataError, r"short returned 1 answers for 4 queries"),
        ({"function": "text"}, DataError, r"text returned a str"),
        ({"function": "raises"}, DataError, r"judge raises raised KeyError: 'x'"),
        (
            {"function": "hangs", "timeout": 0.1},
            ResourceError,
            "judge hangs did not return within 0.1 s",
        ),
        ({"function": "number"}, ConfigError, "a int, not a function"),
        ({"trl": "better"}, ConfigError, "has no method `judge`"),
    ],
)
def test_judges_that_are_wrong_stop_the_run(file, section, error, message):
    section = {
        key: f"{file}:{value}" if isinstance(value, str) else value
        for key, value in section.items()
    }
    with pytest.raises(error, match=message):
        load_judge(section, safe=False)(PROMPTS, FIRST, SECOND)


def test_faults_of_the_section(file):
    for section, message in [
        ({}, "exactly one of function"),
        ({"function": "a:b", "trl": "a:b"}, "function and trl"),
        ({"function": "a:b", "temperature": -1}, "judge.temperature"),
        (
            {"chat": {"url": "https://x", "model": "m", "api_key": "sk-secret"}},
            "judge.chat.api_key: Extra",
        ),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            load_judge(section, safe=False)
        assert "sk-secret" not in str(caught.value)
    for kind in ("function", "trl"):
        with pytest.raises(ConfigError, match="safe"):
            load_judge({kind: f"{file}:better"}, safe=True)


def test_trls_signature_from_our_judge():
    """A failed query stays -1 under shuffling; the best index does not depend on the order shown."""

    def ask(prompts, first, second):
        return [None if "?" in a + b else float(len(a) > len(b)) for a, b in zip(first, second)]

    for shuffle in (True, False):
        judge = as_trl_judge(BothOrders(ask), seed=1)
        pairs = [["long", "no"], ["no", "long"], ["?", "no"]] * 20
        assert judge.judge(["p"] * 60, pairs, shuffle_order=shuffle) == [0, 1, -1] * 20
        scores = judge.judge(["p"] * 60, pairs, shuffle_order=shuffle, return_scores=True)
        assert scores[:2] == [1, 0]
        assert scores[2] != scores[2]
    ties = as_trl_judge(BothOrders(lambda p, a, b: [0.5] * len(a))).judge(
        ["p"] * 200, [["x", "y"]] * 200
    )
    assert 60 < sum(ties) < 140


def test_our_judge_from_trls_signature_and_back():
    class Scored:
        def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
            assert return_scores
            assert not shuffle_order
            return [0.8 if a < b else 0.3 for a, b in completions]

    assert from_trl_judge(Scored())(["p"], ["a"], ["b"]) == [0.8]
    there = BothOrders(lambda p, a, b: [float(x > y) for x, y in zip(a, b)])
    back = BothOrders(from_trl_judge(as_trl_judge(there)))
    assert (
        back(PROMPTS, FIRST, SECOND).probability.tolist()
        == there(PROMPTS, FIRST, SECOND).probability.tolist()
    )
