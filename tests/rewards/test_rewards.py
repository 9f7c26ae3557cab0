"""Rewards: TRL's signature, the policy for every kind of bad answer, verifiers that can be killed."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from alignkit.errors import ConfigError, DataError, ModelError, NumericsError, ResourceError
from alignkit.rewards import Reward, load_reward_model, load_rewards
from alignkit.rewards.combine import Part
from alignkit.rewards.functions import FunctionReward
from alignkit.training.signals import Interrupted, Signals

PROMPTS, COMPLETIONS = ["p0", "p1", "p2"], ["one", "three", "ab"]
IDS = [[1], [1, 2, 3], [1, 2]]


def reward_of(function, drop=False, **options) -> Reward:
    return Reward([Part("mine", FunctionReward("mine", function, drop=drop, **options), drop=drop)])


def lengths(prompts, completions, **kwargs):
    return [len(c) for c in completions]


async def slow_lengths(completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]


def sometimes(prompts, completions, **kwargs):
    return [None if c == "three" else 1.0 for c in completions]


def test_functions_sync_async_named_columns_arrays_and_tensors():
    assert reward_of(lengths)(PROMPTS, COMPLETIONS, completion_ids=IDS, answer=["x"] * 3) == [
        3,
        5,
        2,
    ]
    assert reward_of(slow_lengths)(PROMPTS, COMPLETIONS, completion_ids=IDS, answer=["x"] * 3) == [
        1,
        3,
        2,
    ]
    assert reward_of(lambda completions: np.array([1, 2, 3]))(PROMPTS, COMPLETIONS) == [1, 2, 3]
    assert reward_of(lambda completions: torch.tensor([0.5, 1.0, 2.0]))(PROMPTS, COMPLETIONS) == [
        0.5,
        1,
        2,
    ]
    assert reward_of(lambda completions: [np.float32(1), torch.tensor(2.0), True])(
        PROMPTS, COMPLETIONS
    ) == [1, 2, 1]

    def with_answers(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer)]

    assert reward_of(with_answers)(
        PROMPTS, COMPLETIONS, answer=["one", "x", "ab"], other=[1, 2, 3]
    ) == [1, 0, 1]


def test_the_weighted_sum_leaves_out_what_does_not_apply():
    parts = [Part("a", lengths, 2.0), Part("b", sometimes, -1.0)]
    reward = Reward(parts)
    assert reward(PROMPTS, COMPLETIONS) == [5, 10, 3]
    assert reward.metrics["rewards/a/mean"] == pytest.approx(10 / 3)
    assert reward.metrics["rewards/b/std"] == 0
    assert Reward([Part("b", sometimes)])(PROMPTS, COMPLETIONS) == [1, None, 1]


def test_trls_log_metric_reaches_the_metrics():
    def logs(completions, log_metric, trainer_state, log_extra):
        log_metric("mine", 3)
        log_extra("column", completions)
        return [0.0] * len(completions)

    reward = reward_of(logs)
    reward(PROMPTS, COMPLETIONS)
    assert reward.metrics["rewards/mine/mine"] == 3


def raises_on_three(completions, **kwargs):
    return [1 / (len(c) - 5) for c in completions]


def fails_as_a_batch(completions):
    if len(completions) > 1:
        raise RuntimeError("too many")
    return [1.0]


BAD = {
    "nan": (
        lambda completions: [1.0, float("nan"), 2.0],
        NumericsError,
        r"mine returned nan for 1 of 3 .*rows 1.*'three'",
    ),
    "inf": (
        lambda completions: [float("-inf"), 0.0, 2.0],
        NumericsError,
        r"mine returned -inf .*rows 0.*'p0'.*on_bad",
    ),
    "short": (lambda completions: [1.0], DataError, "mine returned 1 values for 3 completions"),
    "scalar": (lambda completions: 1.0, DataError, r"mine returned 1.0 \(float\)"),
    "scalar tensor": (lambda completions: torch.tensor(1.0), DataError, r"\(float\)"),
    "text": (lambda completions: "good", DataError, r"mine returned 'good' \(str\)"),
    "none": (lambda completions: None, DataError, r"mine returned None \(NoneType\)"),
    "a text in the list": (
        lambda completions: [1.0, "0.5", 1.0],
        DataError,
        r"mine returned '0.5' \(str\) for row 1.*'three'",
    ),
    "a list in the list": (lambda completions: [1.0, [1.0], 1.0], DataError, r"\(list\) for row 1"),
    "raises": (
        raises_on_three,
        DataError,
        r"mine raised ZeroDivisionError: .*first on row 1 of 3: prompt 'p1', completion 'three'",
    ),
    "raises as a batch": (
        fails_as_a_batch,
        DataError,
        "RuntimeError: too many; on the batch of 3, on no single row",
    ),
    "hangs": (
        lambda completions: time.sleep(60),
        ResourceError,
        "mine did not return within 0.2 s",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_stops_the_run_and_names_function_and_rows(case):
    function, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        reward_of(function, timeout=0.2)(PROMPTS, COMPLETIONS)
    assert caught.value.exit_code == {NumericsError: 5, DataError: 3, ResourceError: 7}[error]


def test_bad_rows_are_set_aside_by_policy_and_counted():
    for function in (
        lambda completions: [1.0, float("nan"), 2.0][: len(completions)],
        raises_on_three,
    ):
        reward = Reward(
            [
                Part("mine", FunctionReward("mine", function, drop=True), drop=True),
                Part("other", lengths),
            ]
        )
        total = reward(PROMPTS, COMPLETIONS)
        assert total[1] is None
        assert None not in (total[0], total[2])
        assert reward.metrics["rewards/mine/set_aside"] == 1
    with pytest.raises(DataError, match="mine has no finite value"):
        reward_of(lambda completions: [float("nan")] * 3, drop=True)(PROMPTS, COMPLETIONS)
    with pytest.raises(DataError, match="on each of the 3"):
        reward_of(lambda completions: 1 / 0, drop=True)(PROMPTS, COMPLETIONS)
    with pytest.raises(DataError, match="1 values for 3"):  # a function that is wrong, not a row
        reward_of(lambda completions: [1.0], drop=True)(PROMPTS, COMPLETIONS)


def test_length_and_format():
    length = load_rewards([{"length": {"max_tokens": 10, "buffer": 4}}], safe=True)
    ids = [list(range(n)) for n in (3, 6, 7, 9, 10, 20)]
    assert length(["p"] * 6, ["c"] * 6, completion_ids=ids) == [0, 0, -0.25, -0.75, -1, -1]
    matches = load_rewards([{"format": r"<a>.*</a>", "weight": 0.5}], safe=True)
    texts = ["<a>x\ny</a>", "<a>x</a> and more", "x"]
    assert matches(["p"] * 3, texts) == [0.5, 0, 0]
    assert matches(["p"], [[{"role": "assistant", "content": "<a></a>"}]]) == [0.5]


FILE = """
import os, sys, time
def score(prompts, completions, **kwargs):
    return [1.0 for _ in completions]
def verify(prompt, completion, answer=None):
    print("not an answer")
    if completion == "hang":
        while True: pass
    if completion == "memory":
        return len(bytearray(3 << 30))
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise KeyError(prompt)
    if completion == "long":
        return "x" * (2 << 20)
    if completion == "poison":
        sys.modules[__name__].__dict__["bonus"] = 1
    if completion == "secrets":
        return float("HF_TOKEN" in os.environ)
    if completion == "nan":
        return float("nan")
    return completion == answer
def loops(prompt, completion):
    time.sleep(60)
number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def verifier(file):
    made = []

    def make(name="verify", **fields):
        made.append(
            load_rewards([{"verifier": f"{file}:{name}", "timeout": 0.5, **fields}], safe=False)
        )
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def test_a_verifier_that_hangs_dies_or_eats_memory_costs_one_score(verifier, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    reward = verifier(failed=-1.0, memory_mb=1024)
    texts = ["42", "hang", "41", "die", "memory", "long", "secrets", "42"]
    began = time.monotonic()
    scores = reward(["p"] * 8, texts, answer=["42"] * 8)
    assert scores == [1, -1, 0, -1, -1, -1, 0, 1]
    assert reward.metrics["rewards/verify/failed"] == 4
    assert time.monotonic() - began < 20
    assert reward(["p"], ["42"], answer=["42"]) == [1]


def test_a_verifier_leaves_no_process_behind(verifier):
    reward = verifier(workers=1)
    reward(["p"], ["42"], answer=["42"])
    child = reward.parts[0].call.workers[0].child.pid
    os.kill(child, 0)
    reward.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_exceptions_and_nan_of_a_verifier_follow_the_policy(verifier):
    with pytest.raises(
        DataError,
        match=r"verifier verify raised KeyError: 'q' on row 1: prompt 'q', completion 'raise'",
    ):
        verifier()(["p", "q"], ["42", "raise"], answer=["42", "42"])
    with pytest.raises(NumericsError, match="verify returned nan"):
        verifier()(["p"], ["nan"], answer=["42"])
    dropping = verifier(on_bad="drop")
    assert dropping(["p", "q"], ["42", "raise"], answer=["42", "42"]) == [1, None]
    assert dropping.metrics["rewards/verify/set_aside"] == 1


def test_a_verifier_that_always_fails_stops_the_run(verifier):
    with pytest.raises(
        ResourceError, match=r"loops failed on each of the 2 completions \(no answer within 0.5 s\)"
    ):
        verifier("loops")(["p", "p"], ["a", "b"])
    with pytest.raises(ConfigError, match="has no `absent`"):
        verifier("absent")(["p"], ["a"])


def test_code_is_announced_before_it_runs_and_refused_in_safe_mode(file, caplog):
    reward = load_rewards([{"function": f"{file}:score"}], safe=False)
    assert reward(PROMPTS, COMPLETIONS) == [1, 1, 1]
    assert f"rewards.0.function runs code from {file}:score" in caplog.text
    for kind in ("function", "verifier"):
        with pytest.raises(ConfigError, match="safe"):
            load_rewards([{kind: f"{file}:score"}], safe=True)
    with pytest.raises(ConfigError, match="a int, not a function"):
        load_rewards([{"function": f"{file}:number"}], safe=False)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "exactly one of function, model"),
        ({"format": "a", "model": "b"}, "model and format"),
        ({"format": "("}, "not a regular expression"),
        ({"fromat": "a"}, r"rewards.0.fromat: Extra"),
        ({"format": "a", "weight": float("nan")}, "rewards.0.weight"),
        ({"format": "a", "timeout": 0}, "rewards.0.timeout"),
        ({"length": {"max_tokens": 4, "buffer": 5}}, "buffer 5 is larger"),
    ],
)
def test_faults_of_the_section(entry, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards([entry], safe=True)


def test_equal_names_are_told_apart():
    reward = load_rewards([{"format": "a"}, {"format": "b", "weight": 2}], safe=True)
    assert reward(["p"], ["b"]) == [2]
    assert reward.metrics["rewards/format_2/mean"] == 1
    with pytest.raises(ConfigError, match="empty"):
        load_rewards([], safe=True)


def save_reward_model(folder: Path, outputs: int = 1) -> Path:
    words = {"<pad>": 0, "good": 1, "bad": 2, "fine": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="bad"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="bad"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=16, num_labels=outputs, pad_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_reward_model_scores_texts_alone_and_in_batches_alike(tmp_path):
    folder = save_reward_model(tmp_path / "rm")
    reward = load_rewards([{"model": str(folder), "weight": 2.0}], safe=True)
    prompts, completions = (
        ["good ", "bad fine ", "fine "],
        ["bad", "good good bad good", "fine bad"],
    )
    scores = reward(prompts, completions)
    assert set(reward.metrics) == {"rewards/rm/mean", "rewards/rm/std"}
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    for prompt, completion, score in zip(prompts, completions, scores):
        ids = [{"good": 1, "bad": 2, "fine": 3}[word] for word in (prompt + completion).split()]
        with torch.no_grad():
            expected = 2 * model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]
        assert score == pytest.approx(float(expected), abs=1e-5)
    small = load_reward_model(str(folder))
    small.token_budget = 6
    assert small(prompts, completions) == pytest.approx([s / 2 for s in scores], abs=1e-5)
    with pytest.raises(DataError, match="17 tokens; the reward model reads at most 16"):
        small(["good " * 16], ["bad"])


def test_models_that_are_no_reward_models(tmp_path):
    with pytest.raises(ModelError, match="has 2 outputs"):
        load_reward_model(str(save_reward_model(tmp_path / "two", outputs=2)))
    with pytest.raises(ModelError, match="there is no folder"):
        load_reward_model(str(tmp_path / "absent"))

    # A head that is not in the file would be random, and all scores with it.
    headless = save_reward_model(tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no weights for score\.weight, .* random"):
        load_reward_model(str(headless))


def test_a_reward_may_set_signals_with_a_limit_and_without():
    """Libraries put timeouts of their own around each answer (`signal.alarm`)."""

    def alarmed(completions, **columns):
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(2)
        try:
            return [float(len(c)) for c in completions]
        finally:
            signal.alarm(0)

    before = signal.getsignal(signal.SIGALRM)
    try:
        for timeout in (None, 5.0):
            scores = reward_of(alarmed, timeout=timeout)(PROMPTS, COMPLETIONS)
            assert scores == [float(len(c)) for c in COMPLETIONS]
        with ThreadPoolExecutor(1) as thread:  # as in a notebook's executor
            future = thread.submit(reward_of(alarmed), PROMPTS, COMPLETIONS)
            with pytest.raises(DataError, match=r"mine sets a signal .* main thread .*`verifier`"):
                future.result()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_second_signal_inside_a_reward_ends_the_run_and_is_no_bad_row():
    """The first lets the step end; the second ends the run at once, even where rows that raise are
    set aside.
    """

    def slow(completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("one by one, please")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return [1.0] * len(completions)

    with Signals() as signals, pytest.raises(Interrupted) as stopped:
        reward_of(slow, drop=True)(PROMPTS, COMPLETIONS)
    assert signals.caught == signal.SIGTERM
    assert stopped.value.exit_code == 128 + signal.SIGTERM


def test_an_async_reward_works_inside_a_running_event_loop():
    """A notebook runs one in its main thread."""

    async def counted(completions, **columns):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    async def cell():
        return reward_of(counted)(PROMPTS, COMPLETIONS)

    assert asyncio.run(cell()) == [float(len(c)) for c in COMPLETIONS]


def test_a_weighted_sum_that_is_no_number_any_more_stops_the_run():
    parts = [Part("mine", lambda prompts, completions, **_: [1e99] * len(completions), weight=1e9)]
    with pytest.raises(NumericsError, match=r"reward mine returned inf for 3 of 3"):
        Reward(parts)(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("blocks", [False, True])
def test_an_async_reward_that_hangs_inside_a_running_event_loop_is_ended(blocks):
    """Whether it waits for something, or keeps its own loop from going on."""

    async def hangs(completions, **columns):
        if blocks:
            time.sleep(20)
        await asyncio.sleep(3600)

    async def cell():
        return reward_of(hangs, timeout=0.2)(PROMPTS, COMPLETIONS)

    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"did not return within 0\.2 s"):
        asyncio.run(cell())
    assert time.monotonic() - began < 10
