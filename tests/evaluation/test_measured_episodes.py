"""Models that act in an environment over several turns are measured on episodes."""

import json

import numpy as np
import pytest
from episode_worlds import Echo, prompts
from world import run, save_model, write_rows

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.errors import ConfigError
from alignkit.evaluation.episodes import World
from alignkit.evaluation.evaluate import evaluate
from alignkit.evaluation.measure import Yardstick, evaluation_pair
from alignkit.evaluation.request import Request, checked
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.hf import HFSampler

WORLD = '''
class Counter:
    """Ends with the second turn, or fails where the prompt says so."""

    def reset(self, prompt, **row):
        self.turns = 0
        self.fails = "w9" in prompt

    def step(self, text):
        self.turns += 1
        if self.fails:
            raise RuntimeError("no")
        return " w7", 1.0, self.turns == 2
'''


def yardstick(environment, **settings):
    world = World(LocalEnvironments(environment), 8, DataConfig())
    return Yardstick(prompts(3), 4, 60, 5, world=world, **settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return evaluation_pair(
        save_model(folder / "policy", seed=1), str(save_model(folder / "reference"))
    )


def test_the_figures_of_episodes_are_those_of_the_tokens_that_the_policy_has_drawn(pair):
    same = yardstick(Echo)
    measured = same.measure(pair, "policy", base=same.measure_reference(pair))
    rows = same.world.play(pair, sampler_of(pair, same), same.prompts, Draw(same.samples))
    logps = np.array([[float(e.segments[0].logps.double().sum()) for e in row] for row in rows])
    np.testing.assert_allclose(measured.logp, logps, atol=1e-4)
    np.testing.assert_array_equal(measured.score, [[e.reward for e in row] for row in rows])
    np.testing.assert_array_equal(measured.turns, [[e.turns for e in row] for row in rows])
    assert measured.lengths.sum() == sum(e.own_tokens for row in rows for e in row)
    assert measured.read.sum() == sum(e.tokens for row in rows for e in row)
    assert measured.read.sum() > measured.lengths.sum()
    assert measured.forward_kl is None
    assert abs(measured.kl.mean() - measured.log_ratio.mean()) < 5 * measured.log_ratio.std()

    lines = measured.texts[0][0].splitlines()
    assert len(lines) == 2 * measured.turns[0, 0] - 1
    assert lines[0].startswith("policy")
    assert lines[1].startswith("world")


def test_what_the_reward_makes_of_an_episode_comes_on_top(pair):
    def count(prompts, completions, **_):
        return [float(len(text.split())) for text in completions]

    alone = yardstick(Echo).measure_reference(pair)
    both = yardstick(Echo, reward=count).measure_reference(pair)
    rows = of_reference(pair)
    words = [[len("".join(m["content"] for m in e.messages).split()) for e in row] for row in rows]
    np.testing.assert_array_equal(both.score - alone.score, words)
    assert (alone.kl == 0).all()


def of_reference(pair):
    """The episodes of the reference."""
    same = yardstick(Echo)
    return same.world.play(pair, sampler_of(pair, same), same.prompts, Draw(4, "reference"))


def sampler_of(pair, same):
    return HFSampler(pair, max_new_tokens=same.max_new_tokens, seed=same.seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in an environment, of which one held-out prompt makes every episode fail."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "world.py").write_text(WORLD)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{i} w4"} for i in range(3, 10)])
    code = run(
        "train",
        "rpg",
        f"model.name_or_path={save_model(folder / 'base')}",
        f"data.train={folder / 'prompts.jsonl'}",
        f"rollout.environment={folder / 'world.py'}:Counter",
        "rollout.turns=3",
        "rollout.max_new_tokens=40",
        "train.steps=1",
        "train.batch_size=2",
        "train.save_every=0",
        f"output_dir={folder / 'rpg'}",
    )
    assert code == 0
    return folder


def test_eval_plays_the_episodes_of_the_runs_environment(trained, tmp_path, capsys):
    file = tmp_path / "results.json"
    page = tmp_path / "page.html"
    prompts_file = trained / "prompts.jsonl"
    arguments = ("--prompts", prompts_file, "--samples", 2, "--to", file, "--html", page)
    assert run("eval", trained / "rpg", *arguments) == 0
    results = json.loads(file.read_text())
    means = results["models"][0]["figures"]
    assert 1 < means["episodes/turns"]["value"] <= 3
    assert means["episodes/length"]["value"] > means["length"]["value"]
    assert means["tools/call_frequency"]["value"] == 0
    said = capsys.readouterr()
    assert "turns per episode" in said.out
    assert "share of episodes that failed" in said.out
    assert (
        "2 of 14 episodes failed and were set aside: step: RuntimeError: no (2, first in"
        in said.err
    )

    # They do not pull the means down: of the others nobody has drawn less than a token.
    assert means["episodes/failed"]["value"] == pytest.approx(1 / 7)
    assert means["episodes/turns"]["low"] >= 1

    shown = [row["completions"]["rpg"] for row in results["samples"]]
    assert "world      w7" in shown[0]["text"]
    assert shown[-1]["score"] is None  # the episode of w9 failed
    assert "world      w7" in page.read_text()


def test_what_is_not_known_of_episodes_is_refused(trained):
    asked = {"prompts": str(trained / "prompts.jsonl")}
    with pytest.raises(ConfigError, match=r"--credit can be measured of single answers alone"):
        evaluate(Request([str(trained / "rpg")], credit=True, **asked))
    with pytest.raises(ConfigError, match=r"would run code .* --safe forbids it"):
        evaluate(checked(Request([str(trained / "rpg")], safe=True, **asked)))


@pytest.mark.long
def test_compare_measures_episodes_and_its_report_shows_them_turn_by_turn(trained, tmp_path):
    code = run(
        "compare",
        "rpg",
        f"model.name_or_path={trained / 'base'}",
        f"data.train={trained / 'prompts.jsonl'}",
        f"rollout.environment={trained / 'world.py'}:Counter",
        "rollout.turns=3",
        "rollout.max_new_tokens=40",
        "train.steps=1",
        "train.batch_size=2",
        "train.save_every=0",
        f"compare.prompts={trained / 'prompts.jsonl'}",
        "compare.grid={rpg: {beta: [0.1]}}",
        "compare.samples=2",
        "compare.base_samples=4",
        "compare.workers=0",
        f"output_dir={tmp_path / 'out'}",
    )
    assert code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert " / world w7 / policy w" in report  # a table of Markdown needs no columns in a cell
