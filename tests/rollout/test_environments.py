"""Environments in processes of their own: TRL's duck type, and everything that may go wrong."""

import time
from pathlib import Path

import pytest

from alignkit.config.plugins import load_object
from alignkit.errors import ConfigError
from alignkit.rollout.environment import Instance
from alignkit.rollout.environment_pool import LocalEnvironments, WorkerEnvironments

WORLD = '''
import os, random, time

class Counter:
    """Counts; its tools misbehave on demand."""

    def __init__(self):
        self.count = 0

    def seed(self, number):
        self.number = number

    def reset(self, start=0, **row):
        self.count = start
        return f"count {start} seed {self.number} luck {random.random():.6f}"

    def state(self):
        return str(self.count)

    def add(self, amount: int) -> int:
        """Adds.

        Args:
            amount: how much
        """
        self.count += amount
        return self.count

    def misbehave(self, how: str) -> str:
        """Does what it should not.

        Args:
            how: in which way
        """
        if how == "hang":
            time.sleep(600)
        if how == "raise":
            raise RuntimeError("no")
        if how == "exit":
            os._exit(3)
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "flood":
            return "x" * (1 << 20)
        if how == "print":
            print("x" * (1 << 20), flush=True)
            os.write(1, b'{"results": []}' * 10000)
        if how == "memory":
            bytearray(8 << 30)
        if how == "fork":
            os.fork()
        if how == "bomb":
            while True:
                os.fork()
        if how == "leave":
            if os.fork() == 0:
                os.setsid()
                time.sleep(600)
        return "done"

    def get_reward(self):
        return float(self.count)


class Strange:
    what = None

    def reset(self, what="", **row):
        self.what = what
        return ["a", "list"] if what == "reset" else None

    def step(self, text):
        results = {"pair": ("x", 1.0), "text": (b"x", 1.0, True), "reward": ("x", object(), True),
                   "nan": ("x", float("nan"), True), "digits": ("x", "1.0", True),
                   "done": ("x", 1.0, "no"), "nothing": ("x", 1.0, None)}
        return results.get(self.what, ("fine", 0.5, True))

def double(x: int) -> int:
    """Doubles.

    Args:
        x: a number
    """
    return 2 * x

async def later(x: int) -> int:
    """Waits.

    Args:
        x: a number
    """
    return x
'''

ENDS_THE_EPISODE = ["hang", "exit", "interrupt", "flood", "fork", "bomb"]
IS_READ_BY_THE_POLICY = ["raise", "memory"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world") / "world.py"
    path.write_text(WORLD)
    return path


@pytest.fixture(scope="module")
def workers(file):
    pool = WorkerEnvironments(f"{file}:Counter", [f"{file}:double"], timeout=2.0, memory_mb=2048)
    yield pool
    pool.close()


def reset(start=0, seed=1):
    return {"do": "reset", "row": {"start": start}, "seed": seed}


def tools(*calls):
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"do": "tools", "calls": listed}


def test_tools_are_the_public_methods_and_the_functions_with_the_schemas_of_transformers(workers):
    names = [schema["function"]["name"] for schema in workers.about.schemas]
    assert names == ["double", "add", "misbehave"]
    assert workers.about.schemas[1]["function"]["parameters"] == {
        "type": "object",
        "properties": {"amount": {"type": "integer", "description": "how much"}},
        "required": ["amount"],
    }
    assert workers.about.rewards
    assert not workers.about.steps


def test_each_place_has_an_instance_of_its_own(workers):
    workers.ask([(0, reset(1)), (1, reset(5))])
    answers = workers.ask([(0, tools(("add", {"amount": 2}), ("double", {"x": 4}))), (1, tools())])
    assert answers == [
        {
            "results": [
                {"content": "3", "failed": False},
                {"content": "8", "failed": False},
            ],
            "state": "3",
        },
        {"results": [], "state": "5"},
    ]
    assert workers.ask([(1, {"do": "reward"})]) == [{"reward": 5.0}]


def test_a_fresh_and_a_reused_instance_give_the_same_episode(workers):
    def episode(place):
        questions = [reset(3, seed=7), tools(("add", {"amount": 4})), {"do": "reward"}]
        return [workers.ask([(place, question)])[0] for question in questions]

    first = episode(20)
    assert episode(20) == first
    assert episode(21) == first
    assert "seed 7" in first[0]["text"]


@pytest.mark.parametrize("how", ENDS_THE_EPISODE)
def test_an_episode_that_misbehaves_ends_and_the_others_go_on(workers, how):
    workers.ask([(0, reset(1)), (1, reset(5))])
    began = time.monotonic()
    bad, good = workers.ask(
        [(0, tools(("misbehave", {"how": how}))), (1, tools(("add", {"amount": 1})))]
    )
    while how in ("fork", "bomb") and "failed" not in bad:  # the other answers come later
        assert time.monotonic() - began < 12
        (bad,) = workers.ask([(0, tools())])
    assert set(bad) == {"failed"}
    assert good["state"] == "6"
    assert time.monotonic() - began < 12
    assert workers.ask([(0, reset(2))])[0]["state"] == "2"  # the place is mended


@pytest.mark.parametrize("how", IS_READ_BY_THE_POLICY)
def test_an_exception_in_a_tool_is_read_by_the_policy(workers, how):
    workers.ask([(0, reset(1))])
    (answer,) = workers.ask([(0, tools(("misbehave", {"how": how})))])
    (result,) = answer["results"]
    assert result["failed"]
    assert result["content"].startswith("{'error': ")


def test_what_an_episode_prints_is_no_answer_and_what_it_leaves_behind_ends(workers):
    workers.ask([(3, reset(1))])
    (answer,) = workers.ask([(3, tools(("misbehave", {"how": "print"})))])
    assert answer["results"] == [{"content": "done", "failed": False}]
    workers.ask([(3, tools(("misbehave", {"how": "leave"})))])
    assert workers.ask([(3, reset(4))])[0]["state"] == "4"


def test_a_tool_that_is_not_there_and_arguments_that_do_not_fit_are_failures():
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: one
            b: other
        """
        return a + b

    instance = Instance(None, [add])
    calls = [("add", {"a": 1, "b": 2}), ("sub", {}), ("add", {"a": 1}), ("add", {"a": "x", "b": 1})]
    results = instance.answer(tools(*calls))["results"]
    assert [result["failed"] for result in results] == [False, True, True, True]
    assert results[1]["content"] == "{'error': 'Tool sub not found.'}"


UNDONE = "step: TypeError: step says with a {} whether it is done"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("reset", "reset: TypeError: reset returned a list; text or None is allowed"),
        ("pair", "step: TypeError: step returned a tuple; it should return (text, reward, done)"),
        ("text", "step: TypeError: step returned a bytes; text or None is allowed"),
        ("reward", "step: TypeError: step gave the reward a object; a number is allowed"),
        ("digits", "step: TypeError: step gave the reward a str; a number is allowed"),
        ("done", f"{UNDONE.format('str')}; True or False is allowed"),
        ("nothing", f"{UNDONE.format('NoneType')}; True or False is allowed"),
        ("nan", "step: ValueError: step gave the reward nan; a finite number is allowed"),
    ],
)
def test_foreign_types_end_the_episode_with_the_reason(file, what, reason):
    local = LocalEnvironments(load_object(f"{file}:Strange", what="environment"))
    assert local.about.steps
    (answer,) = local.ask([(0, {"do": "reset", "row": {"what": what}, "seed": 0})])
    if "failed" not in answer:
        (answer,) = local.ask([(0, {"do": "step", "text": "hello"})])
    assert answer == {"failed": reason}


def test_tools_may_be_coroutines(file):
    later = load_object(f"{file}:later", what="tools")
    answer = Instance(None, [later]).answer(tools(("later", {"x": 3})))
    assert answer["results"] == [{"content": "3", "failed": False}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "class Shop:\n    pass\n",
            "cannot be used: TypeError: Shop has no method `reset`; an environment needs one",
        ),
        ("import os\nclass Other:\n    pass\n", "has no `Shop`; it has: Other"),
        ("x = 1 / 0\n", "cannot be used: ZeroDivisionError: division by zero"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_at_the_start(tmp_path, text, reason):
    (tmp_path / "shop.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        WorkerEnvironments(f"{tmp_path / 'shop.py'}:Shop")
    assert str(error.value).startswith("rollout.environment")
    assert str(error.value).endswith(reason)


def test_a_tool_that_is_not_described_is_refused():
    def undescribed(x):
        return x

    with pytest.raises(Exception, match="docstring"):
        Instance(None, [undescribed]).about()
