"""Rollouts through the loop: learning, resume in the middle of a buffer, what is counted and what
stops a run.
"""

import json
import logging
import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from online_world import WANTED, more_wanted, online_job
from world import save_model

from alignkit.errors import DataError, NumericsError
from alignkit.files import read_jsonl
from alignkit.objectives.online.dph import DPH
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.reinforce_plus_plus import ReinforcePlusPlus
from alignkit.objectives.online.rloo import RLOO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.online.token_value import TokenValue
from alignkit.objectives.self_play.egpo import EGPO
from alignkit.objectives.self_play.nash_md import NashMD
from alignkit.oracles import optimum
from alignkit.training import checkpoint
from alignkit.training.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(job, resume=None):
    with job.run:
        train(job, resume)
    return job.pair.state(), read_jsonl(job.run.metrics_file)


@pytest.mark.long
@pytest.mark.parametrize(
    "objective", [GRPO(beta=0.01), RPG(beta=0.01), KLPPO(beta=0.01)], ids=lambda o: type(o).__name__
)
def test_the_reward_goes_up(model, tmp_path, objective):
    _, rows = run(
        online_job(model, tmp_path, objective, steps=40, learning_rate=2e-2, schedule="constant")
    )
    first, last = (sum(r["reward"] for r in part) / len(part) for part in (rows[:5], rows[-5:]))
    assert first < 0.15
    assert last > 0.5
    # the engine and the trainer agree
    assert all(r["sampling/logp_difference_max"] < 1e-4 for r in rows)


@pytest.mark.long
@pytest.mark.parametrize(
    ("objective", "rate"),
    [(NashMD(beta=0.01), 1e-2), (EGPO(beta=0.1), 3e-3)],
    ids=["nash_md", "egpo"],
)
def test_self_play_moves_to_what_the_judge_prefers(model, tmp_path, objective, rate):
    job = online_job(model, tmp_path, objective, steps=40, learning_rate=rate, schedule="constant")
    job.source.batch_size = 16

    def draws():
        return [
            i
            for (b,) in job.source._rollout(999, 0).values()
            for ids in b.completions
            for i in ids.tolist()
        ]

    before = draws()
    run(job)
    after = draws()
    assert before.count(WANTED) / len(before) < 0.05
    assert after.count(WANTED) / len(after) > 0.15


def test_resume_in_the_middle_of_a_buffer_is_bit_equal(model, tmp_path):
    """2 epochs x 2 minibatches over one rollout: steps 1 to 4 share it; step 2 and 3 are inside."""
    objective = KLPPO(beta=0.1, epochs=2, minibatches=2, kl_target=0.5, kl_horizon=20)
    expected, rows = run(
        online_job(model, tmp_path / "a", objective, steps=7, save_every=1, keep=99)
    )
    assert len({r["credit/beta"] for r in rows}) == 2  # adaptive: it moves with every rollout
    for step in (2, 3, 4, 5):
        out = tmp_path / f"b{step}"
        (out / "checkpoints").mkdir(parents=True)
        (tmp_path / "a" / "checkpoints" / f"step-{step}").rename(
            out / "checkpoints" / f"step-{step}"
        )
        (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        weights, again = run(
            online_job(model, out, objective, steps=7, save_every=1, keep=99), "auto"
        )
        assert all(torch.equal(weights[k], v) for k, v in expected.items())
        assert [r["loss"] for r in again] == [r["loss"] for r in rows]


def test_each_epoch_visits_every_bundle_of_the_rollout_once(model, tmp_path):
    source = online_job(model, tmp_path, KLPPO(epochs=2, minibatches=3)).source
    steps = [[b.uid + str(id(b)) for b in source.collect(step)] for step in range(6)]
    epochs = [sorted(uid for step in part for uid in step) for part in (steps[:3], steps[3:])]
    assert epochs[0] == epochs[1]
    assert len(set(epochs[0])) == 12
    assert steps[0] != steps[3]  # in another order


def test_answers_that_are_drawn_once_come_back_and_others_do_not(model, tmp_path):
    """DPH keeps the reference's answers: those of a prompt are the same in every rollout, in a run
    that starts later and on another number of processes.
    """

    def kept(source, number):
        groups = source._rollout(number, 0).values()
        return {
            b.uid: [
                [ids.tolist() for ids, d in zip(b.completions, b.rows["draw"]) if d == draw]
                for draw in (0, 1)
            ]
            for group in groups
            for b in group
        }

    source = online_job(model, tmp_path, DPH(stored=2), n_prompts=4).source
    first, second = kept(source, 0), kept(source, 1)
    later = kept(online_job(model, tmp_path, DPH(stored=2), n_prompts=4).source, 1)
    assert first.keys() == second.keys() == later.keys()
    for uid in first:
        assert len(first[uid][1]) == 2
        assert first[uid][1] == second[uid][1] == later[uid][1]
        assert first[uid][0] != second[uid][0]
    assert source.metrics["sampling/logp_difference_max"] < 1e-4  # of the policy's own alone


class AskingGRPO(GRPO):
    credit_reads_policy: ClassVar[bool] = True


class AskingDPH(DPH):
    credit_reads_policy: ClassVar[bool] = True


class AskingTokenValue(TokenValue):
    @property
    def plan(self):
        return replace(super().plan, credit_reads_policy=True)


@pytest.mark.parametrize(
    ("asking", "sparing"),
    [
        (AskingGRPO(beta=0.1), GRPO(beta=0.1)),
        (AskingDPH(stored=2), DPH(stored=2)),
        (AskingTokenValue(), TokenValue()),
    ],
    ids=["grpo", "dph", "token_value"],
)
def test_a_credit_of_scores_alone_asks_the_policy_nothing(model, tmp_path, asking, sparing):
    """The same weights, bit for bit, as with its log-probs; one bundle shows how the sampler is
    where it draws from the policy."""
    weights = []
    asked = []
    for objective in (asking, sparing):
        job = online_job(model, tmp_path / type(objective).__name__, objective, steps=3)
        logps = job.pair.logps
        bundles_asked = []

        def counted(bundles, *args, logps=logps, bundles_asked=bundles_asked, **kwargs):
            if not torch.is_grad_enabled():
                bundles_asked.append(len(bundles))
            return logps(bundles, *args, **kwargs)

        job.pair.logps = counted
        state, rows = run(job)
        if sparing.plan.samples[0].source == "policy":
            assert all(r["sampling/logp_difference_max"] < 1e-4 for r in rows)
        weights.append(state)
        asked.append(sum(bundles_asked))

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert asked == [12, 3]  # 4 prompts in each of 3 steps


def test_prompts_that_are_too_hard_or_too_easy_make_room_for_others(model, tmp_path):
    """Scores are the prompts' own: 0 for every third, 1 for the next, 1/2 on average for the rest."""

    def reward(prompts, completions, n, **columns):
        return [[0.0, 1.0, float(row % 2)][place % 3] for row, place in enumerate(n)]

    def rollout(pass_rate, refills=3):
        source = online_job(model, tmp_path, GRPO(), n_prompts=30, reward=reward).source
        source.pass_rate, source.refills = pass_rate, refills
        rollout = source._rollout(2, 0)
        return source, {place: bundle for place, (bundle,) in rollout.items()}

    source, kept = rollout((0.2, 0.8))
    assert len(kept) == 4
    assert all(0.2 < bundle.rows["score"].mean() < 0.8 for bundle in kept.values())
    answered = source.order[2 * 16 : 3 * 16]  # a step's share: 4 prompts and 3 refills
    fitting = [place for place, i in enumerate(answered) if i % 3 == 2]
    assert list(kept) == fitting[:4]
    assert [bundle.uid for bundle in kept.values()] == [
        source.prompts[answered[place]].uid for place in fitting[:4]
    ]
    tried = 4 * math.ceil((fitting[3] + 1) / 4)
    assert source.metrics["rollout/fitting"] == sum(place < tried for place in fitting) / tried

    assert len(rollout((0.2, 0.8), refills=0)[1]) < 4
    assert len(rollout((1.5, 2.0))[1]) == 4  # none fits: the first ones are taken
    assert "rollout/fitting" not in rollout(None)[0].metrics


def test_what_a_prompt_can_teach_is_most_where_half_the_answers_are_right():
    """Bae et al. 2025: for a 0/1 reward KL(start || optimum) = log(1 - p + p e^(1 / beta)) - p /
    beta, about p (1 - p) / (2 beta^2).
    """
    found = {}
    for p in (0.02, 0.25, 0.5, 0.75, 0.98):
        start, beta = torch.tensor([1 - p, p], dtype=torch.float64), 4.0
        best = optimum(RLOO(beta=beta), torch.tensor([0.0, 1.0]), start)
        found[p] = float((start * (start / best).log()).sum())
        assert found[p] == pytest.approx(
            math.log(1 - p + p * math.exp(1 / beta)) - p / beta, abs=1e-14
        )
        assert found[p] == pytest.approx(p * (1 - p) / (2 * beta**2), rel=0.1)
    assert max(found, key=found.get) == 0.5


def test_rows_without_a_score_are_set_aside_and_counted(model, tmp_path):
    def picky(prompts, completions, **columns):
        return [None if n % 2 else 1.0 for n in columns["n"]]

    job = online_job(model, tmp_path, GRPO(), reward=picky, steps=1)
    bundles = job.source.collect(0)
    assert 0 < len(bundles) < 4
    assert job.source.metrics["rollout/dropped"] == pytest.approx(1 - len(bundles) / 4)
    assert job.source.metrics["frac_reward_zero_std"] == 1
    nothing = online_job(model, tmp_path / "n", GRPO(), reward=lambda p, c, **k: [None] * len(p))
    with pytest.raises(DataError, match="no completion of this step has a score"):
        nothing.source.collect(0)


def test_a_completion_that_lost_its_group_is_counted_and_teaches_nothing(model, tmp_path):
    def one_in_four(prompts, completions, **columns):
        return [57.0 if i % 4 == 0 else None for i in range(len(completions))]

    job = online_job(model, tmp_path, GRPO(beta=0), reward=one_in_four, steps=2)
    before = job.pair.state()
    after, rows = run(job)
    assert [row["rollout/groups_of_one"] for row in rows] == [1, 1]
    assert [row["grad_norm"] for row in rows] == [0, 0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rewards_reach_credit_as_they_were_returned(model, tmp_path):
    """A difference of 1 beside 1e9 is lost in float32."""

    def near_a_billion(prompts, completions, **columns):
        return [1e9 + i % 2 for i in range(len(completions))]

    job = online_job(model, tmp_path, GRPO(beta=0), reward=near_a_billion, steps=1)
    bundles = job.source.collect(0)
    assert all(bundle.rows["score"].tolist() == [1e9, 1e9 + 1] * 2 for bundle in bundles)
    # half the scores are 0.5 above the mean and half below; their deviation is the square root of 1/3
    for bundle in bundles:
        first = [float(row[0]) for row in bundle.tokens["advantages"]]
        assert first == pytest.approx([-(0.75**0.5), 0.75**0.5] * 2, rel=1e-3)
        assert bundle.tokens["advantages"][0].dtype == torch.float32


@pytest.mark.parametrize("value", [0.1, 3.3, 100.7, 12345.678])
def test_a_constant_reward_leaves_the_weights_alone(model, tmp_path, value):
    def constant(prompts, completions, **columns):
        return [value] * len(completions)

    job = online_job(model, tmp_path, ReinforcePlusPlus(), reward=constant, steps=3)
    before = job.pair.state()
    after, rows = run(job)
    assert [row["loss"] for row in rows] == [0, 0, 0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scores_that_never_differ_are_said(model, tmp_path, caplog):
    """Five rollouts in a row, then once every five; one rollout with a difference starts the count
    anew.
    """

    def reward(prompts, completions, **columns):
        drawn.append(len(drawn))
        return [0.1 if len(drawn) != 4 else float(i) for i in range(len(prompts))]

    drawn: list[int] = []
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        _, rows = run(online_job(model, tmp_path, GRPO(beta=0), reward=reward, steps=14))
    assert [row["frac_reward_zero_std"] for row in rows] == [1, 1, 1, 0] + [1] * 10
    said = [r.getMessage() for r in caplog.records]
    assert [text.partition(" every")[0] for text in said] == [
        "in the last 5 rollouts",
        "in the last 10 rollouts",
    ]
    assert "one and the same score (0.1 on average)" in said[0]
    assert [row["grad_norm"] == 0 for row in rows] == [
        bool(row["frac_reward_zero_std"]) for row in rows
    ]


def test_a_rewards_own_figures_reach_the_metrics(model, tmp_path):
    class Reward:
        metrics = {"rewards/mine/failed": 2.0}

        def __call__(self, prompts, completions, **columns):
            return [0.0] * len(prompts)

    _, rows = run(online_job(model, tmp_path, GRPO(), reward=Reward(), steps=1))
    assert rows[0]["rewards/mine/failed"] == 2.0


def test_invalid_verdicts_leave_the_batch_and_never_look_like_a_win(model, tmp_path):
    def sulky(prompts, first, second):
        verdict = more_wanted(prompts, first, second)
        verdict.valid[::2] = False
        verdict.probability[~verdict.valid] = float("nan")
        return verdict

    job = online_job(model, tmp_path, NashMD(), judge=sulky)
    bundles = job.source.collect(0)
    assert len(bundles) == 2
    assert job.source.metrics["judge/invalid"] == 0.5
    assert all(b.rows["preference"].isfinite().all() for b in bundles)

    def silent(prompts, first, second):
        verdict = sulky(prompts, first, second)
        verdict.valid[:] = False
        return verdict

    with pytest.raises(NumericsError, match="every verdict of the judge"):
        online_job(model, tmp_path, NashMD(), judge=silent).source.collect(0)


def test_extragradient_checkpoint_resumes_bit_equal(model, tmp_path):
    settings = {"steps": 4, "save_every": 2, "keep": 9}
    expected, rows = run(online_job(model, tmp_path / "a", EGPO(beta=0.1), **settings))
    (tmp_path / "a" / "model").rename(tmp_path / "done")
    weights, again = run(online_job(model, tmp_path / "a", EGPO(beta=0.1), **settings), "auto")
    assert checkpoint.steps(tmp_path / "a" / "checkpoints") == [2]
    assert all(torch.equal(weights[k], v) for k, v in expected.items())
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
