"""Bad input of online and self-play runs, from the command line: the exit code, and who and where
in the message.
"""

import pytest
from world import run, save_model, write_rows

CODE = """
import signal
import time

def good(prompts, completions, **columns): return [float(len(c)) for c in completions]
def nans(prompts, completions, **columns): return [0.5, float("nan")] * (len(prompts) // 2)
def infinite(prompts, completions, **columns): return [float("-inf")] + [0.0] * (len(prompts) - 1)
def short(prompts, completions, **columns): return [1.0]
def huge(prompts, completions, **columns): return [1] * (len(prompts) - 1) + [10**400]
def wide(prompts, completions, **columns): return [1e60 * n for n in range(len(prompts))]
def scalar(prompts, completions, **columns): return 1.0
def word(prompts, completions, **columns): return "good"
def raises(prompts, completions, **columns): return [{}[n] if n == 1 else 1.0 for n in columns["n"]]
def hangs(prompts, completions, **columns): time.sleep(60)

def sulks(prompts, first, second): return [-1.0] * len(prompts)
def mumbles(prompts, first, second): return ["maybe"] * len(prompts)
def silent(prompts, first, second): return []
def sleeps(prompts, first, second): time.sleep(60)
"""
REWARDS = {
    "nans": (
        5,
        "reward nans returned nan for 4 of 8 completions (rows 1, 3, 5, 7); first: prompt 'w",
    ),
    "infinite": (
        5,
        "reward infinite returned -inf for 1 of 8 completions (rows 0); first: prompt 'w",
    ),
    "huge": (
        5,
        "reward huge returned inf for 1 of 8 completions (rows 7); first: prompt 'w",
    ),
    "wide": (5, "the advantages of 8 of 8 completions are not finite in float32; the first one's"),
    "short": (3, "reward short returned 1 values for 8 completions"),
    "scalar": (3, "reward scalar returned 1.0 (float)"),
    "word": (3, "reward word returned 'good' (str)"),
    "raises": (3, "reward raises raised KeyError: 1; first on row "),
    "hangs": (7, "reward hangs did not return within 0.3 s"),
}
JUDGES = {
    "sulks": (5, "every verdict of the judge in this step is invalid"),
    "mumbles": (5, "every verdict of the judge in this step is invalid"),
    "silent": (3, "judge silent returned 0 answers for "),
    "sleeps": (7, "judge sleeps did not return within 0.3 s"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    (folder / "mine.py").write_text(CODE)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{3 + n}", "n": n} for n in range(4)])
    return folder


@pytest.fixture
def train(world, tmp_path, capsys):
    """Exit code and stderr of a run on the tiny model: 4 prompts a step, 2 completions each."""

    def call(recipe, *overrides):
        settings = "train.steps=3 train.batch_size=4 train.warmup_steps=0 train.log_samples_every=0 rollout.completions=2"
        paths = [
            f"model.name_or_path={world / 'model'}",
            f"data.train={world / 'prompts.jsonl'}",
            f"output_dir={tmp_path / 'out'}",
        ]
        code = run(
            "train", recipe, *paths, *settings.split(), "rollout.max_new_tokens=4", *overrides
        )
        assert not (tmp_path / "out" / "model").exists()
        return code, " ".join(capsys.readouterr().err.split())

    return call


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_is_wrong_stops_the_run(train, world, caplog, name):
    code, err = train("rloo", f"rewards=[{{function: '{world / 'mine.py'}:{name}', timeout: 0.3}}]")
    assert (code, REWARDS[name][1] in err) == (REWARDS[name][0], True), err
    traceback = [record.exc_info for record in caplog.records if record.exc_info]
    assert bool(traceback) == (name == "raises")  # where in the user's code, for the log


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_gives_no_verdict_stops_the_run(train, world, name):
    code, err = train(
        "nash_md",
        f"judge={{function: '{world / 'mine.py'}:{name}', timeout: 0.3, both_orders: false}}",
    )
    assert (code, JUDGES[name][1] in err) == (JUDGES[name][0], True), err


def test_a_step_that_breaks_is_never_a_loss_of_zero(train, world):
    """At such a rate the first update leaves weights whose log-probs are not finite: the next
    rollout meets them.
    """
    rate = ("train.learning_rate=1.0e+30", "train.max_grad_norm=0", "train.save_every=1")
    code, err = train("rloo", f"rewards.0.function={world / 'mine.py'}:good", *rate)
    assert code == 5, err
    assert "alignkit: step 2: sampling: the model's log-probs are not finite" in err
    assert "lower train.learning_rate, or go on from an earlier checkpoint" in err
    assert "step 2/3" not in err  # no row, no loss


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.completions=1", "greater than or equal to 2"),
        ("rollout.temperature=0", "greater than 0"),
        ("rollout.temperature=.nan", "finite"),
        ("rollout.top_p=0", "greater than 0"),
        ("rollout.max_new_tokens=0", "greater than 0"),
        ("train.batch_size=0", "greater than 0"),
        ("objective.mixture=1.5", "less than or equal to 1"),
    ],
)
def test_what_can_sample_nothing_is_refused_before_weights_load(train, override, words):
    recipe = "nash_md" if "mixture" in override else "rloo"
    # a model that is looked for is exit 4
    code, err = train(recipe, "model.name_or_path=/nowhere", override)
    assert code == 2
    assert f"override `{override}`: `{override.partition('=')[0]}` is " in err
    assert words in err
