"""Ensembles of reward models: mean less disagreement, and the pairs that they dispute."""

import json

import numpy as np
import pytest
from world import run, save_model, save_reward_model, write_rows

from alignkit.errors import ConfigError
from alignkit.rewards import load_reward_model, load_rewards
from alignkit.rewards.ensemble import Ensemble, most_disputed


def says(*scores):
    return lambda prompts, completions, **_: list(scores)


def test_mean_less_deviation_by_hand():
    """Scores 1, 3 have mean 2 and deviation 1; where both say 5 nothing is taken off."""
    ensemble = Ensemble([says(1.0, 5.0), says(3.0, 5.0)], pessimism=0.5)
    assert ensemble(["a", "b"], ["x", "y"]) == [1.5, 5.0]
    assert ensemble.metrics == {"disagreement": 0.5}
    assert Ensemble([says(1.0), says(3.0)])(["a"], ["x"]) == [2.0]


def test_a_lower_bound_prefers_what_is_known():
    """The better mean that nobody agrees on loses to the smaller one that all do."""
    members = [says(4.0, 1.5), says(0.0, 1.5)]
    bold, sure = Ensemble(members)(["a"] * 2, ["x", "y"]), Ensemble(members, 1.0)(["a"] * 2, "xy")
    assert bold[0] > bold[1]
    assert sure[0] < sure[1]


def test_the_most_disputed_pair_is_found_by_differences():
    """Members that differ by a constant agree on every pair; the third completion is disputed."""
    scores = np.array([[0.0, 1.0, 2.0], [5.0, 6.0, 3.0]])
    assert most_disputed(scores, [(0, 1), (0, 2), (1, 2)], 1) == [(0, 2)]
    assert most_disputed(scores[:, :2], [(0, 1)], 5) == [(0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    save_model(folder / "lm")
    for seed in (1, 2):
        save_reward_model(folder / f"reward-{seed}", folder / "lm", seed)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(3, 7)])
    (folder / "judge.py").write_text(
        "def score(prompts, completions, **_):\n"
        "    open('asked.txt', 'a').write('.' * len(completions))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    return folder


def test_the_section_is_the_ensemble_of_its_models(folder):
    names = [str(folder / f"reward-{seed}") for seed in (1, 2)]
    reward = load_rewards([{"ensemble": names, "pessimism": 2.0}], safe=True)
    texts = [" w5 w6", " w7"]
    each = np.array([load_reward_model(name)(["w3"] * 2, texts) for name in names])
    wanted = each.mean(0) - 2.0 * each.std(0)
    assert reward(["w3"] * 2, texts) == pytest.approx(wanted.tolist(), abs=1e-12)
    assert reward.metrics["rewards/ensemble/disagreement"] == pytest.approx(each.std(0).mean())
    for entry, words in (
        ({"ensemble": names[:1]}, "at least 2 items"),
        ({"format": "a", "pessimism": 1}, "pessimism is for an ensemble"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_rewards([entry], safe=True)


def test_pairs_ask_about_what_is_disputed(folder, monkeypatch, capsys):
    """One pair of each prompt is scored, and it is the one on which the two models disagree most."""
    monkeypatch.chdir(folder)
    models = ["--active", "reward-1", "--active", "reward-2"]
    common = ["lm", "prompts.jsonl", "--reward", "judge.py:score", "--max-new-tokens", "4"]
    asking = ["--samples", "5", "--label-temperature", "0", "--to", "pairs.jsonl"]
    assert run("pairs", *common, *asking, *models) == 0
    assert "8 completions scored" in capsys.readouterr().out
    assert (folder / "asked.txt").read_text() == "." * 8
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert 0 < len(rows) <= 4

    assert run("pairs", *common, "--to", "other.jsonl", *models[:2]) == 2
    assert "--active with 1 reward models" in capsys.readouterr().err
