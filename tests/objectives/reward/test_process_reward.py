"""Process rewards: the loss by hand, rows of steps, and completions scored by their steps."""

import math

import pytest
import torch
from transformers import AutoTokenizer
from world import run, save_model, write_rows

from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles
from alignkit.errors import ConfigError, DataError
from alignkit.losses import step_loss
from alignkit.rewards import load_reward_model, load_rewards
from alignkit.rewards.steps import StepRewards

STEP = " w9"  # ends every step
ROWS = [
    {"prompt": "w3", "completions": [" w5", f" w{i}", " w5 w6"], "labels": [True, False, i < 13]}
    for i in range(10, 18)
]


def test_by_hand_and_as_the_cross_entropy_of_two_logits():
    """Reward log 3: P(right) = 3/4. Two logits whose difference is the reward have the same loss."""
    rewards = torch.tensor([math.log(3), math.log(3)], dtype=torch.float64)
    labels = torch.tensor([True, False])
    losses = step_loss(rewards, labels)
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-12)
    logits = torch.stack([torch.full_like(rewards, 0.7), rewards + 0.7], -1)
    wanted = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")
    torch.testing.assert_close(losses, wanted, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    save_model(folder / "base")
    return folder


def loaded(folder, rows, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    config = DataConfig(step_separator=STEP, append_eos=False, **changes)
    return load_bundles(config, "labelled", tokenizer, source=rows)


def test_every_step_is_a_row_behind_those_before_it(folder):
    bundles, _ = loaded(folder, ROWS[:1])
    texts = [[b.prompt.tolist(), b.completions[0].tolist()] for b in bundles]
    assert texts == [[[3], [5, 9]], [[3, 5, 9], [10, 9]], [[3, 5, 9, 10, 9], [5, 6, 9]]]
    assert [bool(b.rows["label"]) for b in bundles] == [True, False, True]
    assert len({b.uid for b in bundles}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "3 completions and 1 labels; there is one for each step"),
        ({"completions": "w5"}, "completions is no list of texts"),
        ({"prompt": [{"role": "user", "content": "w3"}]}, "prompt is no text"),
    ],
)
def test_rows_that_are_no_steps_are_named(folder, change, message):
    with pytest.raises(DataError, match=message):
        loaded(folder, [ROWS[0], {**ROWS[0], **change}])


def test_a_completion_is_as_good_as_its_steps():
    """Log-odds 0, log 3 and -log 3 by the length of the text so far: P = 1/2, 3/4, 1/4."""
    odds = {2: 0.0, 4: math.log(3), 6: -math.log(3)}

    def model(prompts, completions):
        assert prompts == ["p"] * len(completions)
        return [odds[len(text)] for text in completions]

    whole = {"min": 1 / 4, "product": 3 / 32, "last": 1 / 4}
    for reduce, probability in whole.items():
        steps = StepRewards(model, "\n", reduce)
        scores = steps(["p"] * 3, ["a\nb\nc\n", "a\nb", "\n"])
        assert scores[0] == pytest.approx(math.log(probability), abs=1e-12)
        assert scores[2] is None
    assert steps(["p"], ["a\nb"]) == pytest.approx([math.log(3 / 4)], abs=1e-12)


def test_a_run_learns_its_steps_and_scores_by_them(folder):
    write_rows(folder / "train.jsonl", ROWS[:6])
    write_rows(folder / "eval.jsonl", ROWS[6:])
    files = [f"data.{part}={folder / f'{part}.jsonl'}" for part in ("train", "eval")]
    sizes = ["train.steps=25", "train.batch_size=18", "train.learning_rate=1e-2"]
    quiet = ["train.save_every=0", f"data.step_separator='{STEP}'", f"output_dir={folder / 'run'}"]
    base = f"model.name_or_path={folder / 'base'}"
    assert run("train", "process_reward", base, *files, *sizes, *quiet) == 0

    name = str(folder / "run" / "model")
    model = load_reward_model(name)
    right, wrong = model(["w3", "w3 w5 w9"], [" w5 w9", " w11 w9"])
    assert right > 0 > wrong
    reward = load_rewards([{"model": name, "steps": STEP}], safe=True)
    (score,) = reward(["w3"], [" w5 w9 w11 w9"])
    (odds,) = model(["w3"], [" w5 w9 w11 w9"])
    assert score == pytest.approx(-math.log1p(math.exp(-odds)), abs=1e-5)
    with pytest.raises(ConfigError, match="steps are for a model"):
        load_rewards([{"format": "a", "steps": "x"}], safe=True)
