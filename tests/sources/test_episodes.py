"""Episodes through the loop: credit over their turns, what is counted, resume in their middle."""

import json
import logging

import pytest
import torch
from episode_worlds import DoneAtOnce, Echo
from online_world import online_job
from world import save_model

from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.config.data import DataConfig
from alignkit.errors import ConfigError, DataError
from alignkit.files import read_jsonl
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.gspo import GSPO
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.rpg import RPG
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.renderer import ChatRenderer, TextRenderer
from alignkit.rollout.turns import TurnSampler
from alignkit.sources.crediting import Episodes
from alignkit.training.loop import train

FORGETFUL = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}"
    "{{ m.content if loop.last or m.role == 'user' else 'w9' }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)
CAP = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def fives(prompts, completions, completion_ids, **columns):
    return [float(ids.count(5)) for ids in completion_ids]


def agent_job(model, out, objective, environment=Echo, *, template=None, reward=None, **settings):
    job = online_job(model, out, objective, reward=reward, **settings)
    source = job.source
    source.sampler.max_new_tokens = CAP
    tokenizer = job.pair.tokenizer
    if environment is None:
        return job

    renderer = TextRenderer(tokenizer, DataConfig())
    if template is not None:
        tokenizer.chat_template = template
        renderer = ChatRenderer(tokenizer, DataConfig(), stops=[2])
        for prompt in source.prompts:
            prompt.text = [{"role": "user", "content": "w5 w6"}]
            prompt.ids = renderer.start(prompt.text)
    source.turns = TurnSampler(
        source.sampler,
        LocalEnvironments(environment),
        renderer,
        turns=4,
        max_new_tokens=CAP,
        context=128,
        seed=0,
    )
    return job


def run(job, resume=None):
    with job.run:
        train(job, resume)
    return job.pair.state(), read_jsonl(job.run.metrics_file)


def bundles(source):
    return [bundle for row in source._rollout(0, 0).values() for bundle in row]


@pytest.mark.parametrize("objective", [GRPO(), RPG(), KLPPO()], ids=lambda o: type(o).__name__)
def test_an_environment_that_is_done_at_once_is_todays_rollout_bit_for_bit(
    model, tmp_path, objective
):
    class Silent(DoneAtOnce):
        def step(self, text):
            return "", 0.0, True

    today = bundles(agent_job(model, tmp_path / "a", objective, None, reward=fives).source)
    episodes = bundles(agent_job(model, tmp_path / "b", objective, Silent, reward=fives).source)
    assert len(today) == len(episodes) == 4
    for old, new in zip(today, episodes, strict=True):
        assert torch.equal(old.prompt, new.prompt)
        assert torch.equal(old.rows["score"], new.rows["score"])
        for name, values in old.tokens.items():
            assert all(map(torch.equal, values, new.tokens[name]))
        assert all(map(torch.equal, old.completions, new.completions))
        assert all(map(torch.equal, old.masks, new.masks))


def test_the_trainers_log_probs_of_own_tokens_are_the_samplers(model, tmp_path):
    source = agent_job(model, tmp_path, GRPO()).source
    assert any(not mask.all() for bundle in bundles(source) for mask in bundle.masks)
    assert source.metrics["sampling/logp_difference_max"] < 1e-5


def test_what_an_episode_earns_is_its_score_and_its_metrics_have_trls_names(model, tmp_path):
    source = agent_job(model, tmp_path, GRPO(), reward=fives).source
    for bundle in bundles(source):
        for score, rewards, ids, mask in zip(
            bundle.rows["score"], bundle.tokens["reward"], bundle.completions, bundle.masks
        ):
            assert rewards.sum() == score
            assert rewards[~mask].eq(0).all()
            assert score >= ids.tolist().count(5)
    metrics = source.metrics
    assert 1 < metrics["episodes/turns"] <= 4
    assert metrics["episodes/length"] > metrics["completions/mean_length"]
    assert metrics["episodes/failed"] == 0
    assert "tools/call_frequency" not in metrics  # there are none


def test_failed_episodes_are_set_aside_and_counted(model, tmp_path, caplog):
    class Fragile(Echo):
        def step(self, text):
            if "w7" in text.split():
                raise RuntimeError("no sevens")
            return super().step(text)

    source = agent_job(model, tmp_path, GRPO(), Fragile).source
    with caplog.at_level(logging.WARNING, "alignkit"):
        left = sum(len(bundle.completions) for bundle in bundles(source))
    failed = round(source.metrics["episodes/failed"] * 16)
    assert 0 < failed < 16
    assert left == 16 - failed
    assert f"{failed} of 16 episodes failed and were " in caplog.text
    assert f"set aside: step: RuntimeError: no sevens ({failed}, first in random:" in caplog.text


def test_a_step_without_an_episode_left_is_an_error(model, tmp_path):
    class Broken(Echo):
        def reset(self, **row):
            raise OSError("no world today")

    with pytest.raises(DataError, match="no completion of this step has a score"):
        bundles(agent_job(model, tmp_path, GRPO(), Broken).source)


def test_credit_runs_on_over_the_cut_of_a_rewritten_history(model, tmp_path):
    """GRPO's advantage belongs to episodes: the mean is over them, not over their segments."""
    source = agent_job(model, tmp_path, GRPO(), template=FORGETFUL).source
    every = bundles(source)
    rows: dict[int, list] = {}
    for bundle in every:
        for k, episode in enumerate(bundle.rows["episode"].tolist()):
            own = bundle.masks[k]
            rows.setdefault(episode, []).append(
                {
                    "group": int(bundle.rows["group"][k]),
                    "segment": int(bundle.rows["segment"][k]),
                    "score": float(bundle.rows["score"][k]),
                    "advantage": bundle.tokens["advantages"][k][own],
                    "tokens": int(own.sum()),
                    "whole": int(bundle.rows["episode_tokens"][k]),
                }
            )
    assert max(map(len, rows.values())) > 1
    assert RolloutBatch.counts(every)["rows"] == len(rows) == 16
    for parts in rows.values():
        assert sorted(part["segment"] for part in parts) == list(range(len(parts)))
        assert sum(part["tokens"] for part in parts) == parts[0]["whole"]
        group = [
            other[0]["score"] for other in rows.values() if other[0]["group"] == parts[0]["group"]
        ]
        scores = torch.tensor(group, dtype=torch.float64)
        spread = scores.std() if scores.max() > scores.min() else 1.0
        wanted = float((parts[0]["score"] - scores.mean()) / (spread + 1e-4))
        for part in parts:
            assert part["advantage"].sub(wanted).abs().max() < 1e-6


def test_a_mean_over_completions_counts_an_episode_once_whatever_its_segments():
    """Two episodes of three tokens, one of them cut after its first token."""
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0, 0], [5.0, 6.0, 0]])
    zeros = torch.zeros(3, 3)
    tokens = TokenLogps(zeros, {}, mask, zeros, {}, whole_lengths=torch.tensor([3, 3, 3]))
    term = GRPO(aggregation="sequence_mean").term("x", values, tokens)
    assert float(term.values.sum()) / 2 == pytest.approx((2 + 5) / 2, abs=1e-6)
    with pytest.raises(ConfigError, match="weighs whole completions"):
        GSPO().term("x", torch.zeros(3), tokens)


def test_rows_are_joined_and_taken_apart_again():
    episodes = Episodes.of([7, 7, 9, 7], [1, 0, 0, 2], "cpu")
    values = torch.arange(8.0).view(4, 2)
    tokens = TokenLogps(values, {"reference": values}, torch.ones(4, 2, dtype=torch.bool), values)
    scores = torch.tensor([1.0, 1.0, 2.0, 1.0])
    joined = episodes.joined(RolloutBatch(tokens, scores, torch.tensor([0, 0, 1, 0])))
    assert joined.tokens.policy.tolist() == [[2, 3, 0, 1, 6, 7], [4, 5, 0, 0, 0, 0]]
    assert joined.tokens.mask.sum(-1).tolist() == [6, 2]
    assert joined.scores.tolist() == [1, 2]
    assert joined.groups.tolist() == [0, 1]
    assert torch.equal(episodes.apart(joined.tokens.policy), values)


@pytest.mark.parametrize("template", [None, FORGETFUL], ids=["one segment", "segments"])
def test_resume_in_the_middle_of_a_rollout_of_episodes_is_bit_equal(model, tmp_path, template):
    objective = KLPPO(beta=0.1, epochs=2, minibatches=2, kl_target=0.5, kl_horizon=20)
    settings = {"template": template, "steps": 6, "save_every": 1, "keep": 99}
    expected, rows = run(agent_job(model, tmp_path / "a", objective, **settings))
    assert rows[0]["episodes/turns"] > 1
    for step in (3, 4):  # inside a rollout, and at its end
        out = tmp_path / f"b{step}"
        (out / "checkpoints").mkdir(parents=True)
        (tmp_path / "a" / "checkpoints" / f"step-{step}").rename(out / f"checkpoints/step-{step}")
        (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        weights, again = run(agent_job(model, out, objective, **settings), "auto")
        assert all(torch.equal(weights[k], v) for k, v in expected.items())
        assert [r["loss"] for r in again] == [r["loss"] for r in rows]
