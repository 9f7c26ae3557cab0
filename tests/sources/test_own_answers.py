"""Own answers in the place of given ones: the law of the choice, when the share grows, what is kept,
and that processes and a resumed run agree.
"""

import pytest
import torch
from accelerate import Accelerator
from world import make_job, pairs, save_model

from alignkit import Distill
from alignkit.batches import Adaptive, Bundle, Draw
from alignkit.files import read_jsonl
from alignkit.rollout.hf import HFSampler
from alignkit.sources.dataset import DatasetSource
from alignkit.sources.own_answers import FRESH, GIVEN, REPLAYED, OwnAnswers
from alignkit.sources.sampled_pairs import SampledPairs
from alignkit.training.loop import train

DISTILLM = Distill(
    divergence="skew_kl", share=0.5, share_growth=0.25, share_tolerance=0.0, replay=6
)


def answers(n, first=0):
    return [
        Bundle(torch.tensor([i]), [torch.tensor([i])], [torch.tensor([True])], str(i))
        for i in range(first, first + n)
    ]


def own(share=0.6, steps=10, **adaptive):
    draw = Draw(1, share=share, adaptive=Adaptive(**adaptive))
    return OwnAnswers(draw, seed=0, batch_size=4, steps=steps)


@pytest.mark.parametrize(("step", "fresh"), [(0, 0.6), (4, 0.36), (10, 0.0)])
def test_the_share_of_fresh_answers_falls_with_the_steps(step, fresh):
    """P(fresh) = share (1 - t / T), P(replayed) = share t / T: within 4 standard deviations."""
    source = own(replay=100)
    source.keep(answers(50))
    kinds, places = source.choices(range(40_000), 0, step)
    for kind, wanted in ((FRESH, fresh), (REPLAYED, 0.6 - fresh), (GIVEN, 0.4)):
        spread = (wanted * (1 - wanted) / len(kinds)) ** 0.5
        assert abs(float((kinds == kind).double().mean()) - wanted) <= 4 * spread
    counts = places.bincount(minlength=50)
    assert len(counts) == 50
    assert ((counts - 800).abs() < 5 * 800**0.5).all(), "every kept row comes back as often"


def test_nothing_is_replayed_before_a_batch_of_answers_is_there_and_the_oldest_leave():
    source = own(share=1.0, replay=5)
    source.keep(answers(3))
    assert (source.choices(range(100), 0, 9)[0] == FRESH).all()
    source.keep(answers(1, first=3))
    assert (source.choices(range(100), 0, 9)[0] == REPLAYED).any()
    source.keep(answers(3, first=4))
    assert [bundle.uid for bundle in source.kept] == ["2", "3", "4", "5", "6"]

    without = own(share=1.0)
    without.keep(answers(9))
    assert without.kept == []
    assert (without.choices(range(100), 0, 9)[0] == FRESH).all()


def test_the_share_grows_where_the_loss_has_risen():
    source = own(share=0.8, growth=0.15, tolerance=0.1)
    shares = []
    for loss in (1.0, 1.09, 0.5, 1.1, 1.15, 1.25):
        source.evaluated(loss)
        shares.append(round(source.share, 6))
    # The first loss is what others are compared with, then the one that let the share grow.
    assert shares == [0.8, 0.8, 0.8, 0.95, 0.95, 1.0]


def test_what_cannot_be_asked_for():
    for settings, message in (
        ({"share": 1.0, "replay": 5}, "with share 1 there are no given ones"),
        ({"share": 1.0, "share_growth": 0.1}, "with share 1 there are no given ones"),
        ({"replay": 5}, "set share or share_growth"),
    ):
        with pytest.raises(ValueError, match=message):
            Distill(**settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def distillm_job(model, out, objective=DISTILLM, **settings):
    settings = {"steps": 6, "eval_every": 1, "evaluation": pairs(4, seed=9, k=1), **settings}
    job = make_job(model, out, objective, pairs(20, k=1), **settings)
    job.source = SampledPairs(
        job.source,
        HFSampler(job.pair, max_new_tokens=4),
        objective.plan,
        1,
        job.accelerator,
        steps=job.steps,
    )
    # The loss falls as the policy learns, so that its negative rises.
    job.observe = lambda metrics: job.source.evaluated({"eval_loss": -metrics["eval_loss"]})
    return job


def run(job, resume=None):
    with job.run:
        train(job, resume)
    return read_jsonl(job.run.metrics_file)


def test_a_resumed_run_goes_on_bit_for_bit(model, tmp_path):
    job = distillm_job(model, tmp_path / "whole", save_every=3, keep=9)
    rows = run(job)
    wanted = [row["rollout/wanted_share"] for row in rows]
    assert wanted[0] == 0.5
    assert wanted[2] < wanted[-1], "a loss that rises lets the share grow, also after step 3"
    assert sum(row["rollout/replayed"] for row in rows) > 0
    assert 0 < len(job.source.own[0].kept) <= 6

    part = distillm_job(model, tmp_path / "part", save_every=3, keep=9)
    part.run.path.mkdir()
    for name in ("checkpoints/step-3", "metrics.jsonl"):
        (part.run.path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).rename(part.run.path / name)
    resumed = run(part, "auto")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    expected = job.pair.state()
    assert all(torch.equal(value, expected[name]) for name, value in part.pair.state().items())


def test_processes_keep_and_replay_the_same_rows(model, tmp_path, monkeypatch):
    job = distillm_job(model, tmp_path / "run")
    bundles = pairs(20, k=1)

    def source(rank, world):
        rows = DatasetSource(bundles, DISTILLM.plan, 6, seed=0, rank=rank, world=world)
        sampler = HFSampler(job.pair, max_new_tokens=4)
        return SampledPairs(rows, sampler, DISTILLM.plan, 1, Accelerator(cpu=True), steps=5)

    whole = source(0, 1)
    ranks = [source(rank, 2) for rank in range(2)]
    for step in range(5):
        # What one rank keeps, the gathering of two processes gives to both.
        fresh = []
        monkeypatch.setattr("alignkit.sources.sampled_pairs.gather_object", lambda own: [])
        parts = []
        for rank in ranks:
            rank._keep_fresh = lambda: None
            parts.append(rank.collect(step))
            fresh += rank._fresh[0]
        for rank in ranks:
            rank.own[0].keep([b for _, b in sorted(fresh, key=lambda entry: entry[0])])
        monkeypatch.setattr("alignkit.sources.sampled_pairs.gather_object", lambda own: own)

        rows = whole.collect(step)
        for number, part in enumerate(parts):
            for mine, same in zip(part, rows[number::2], strict=True):
                assert mine.uid == same.uid
                assert torch.equal(mine.completions[0], same.completions[0])
        assert ranks[0].metrics == whole.metrics
    assert whole.metrics["rollout/replayed"] > 0
