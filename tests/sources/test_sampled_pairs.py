"""Rows with samples beside them: the row's own completions stay, samples depend on the row's place
alone, training runs.
"""

import torch
from accelerate import Accelerator
from world import make_job, pairs, save_model

from alignkit import DRPO, HyPO
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.files import read_jsonl
from alignkit.judges import Verdict
from alignkit.policies.load import load_pair
from alignkit.rollout.hf import HFSampler
from alignkit.sources.dataset import DatasetSource
from alignkit.sources.sampled_pairs import SampledPairs
from alignkit.training.loop import train


def test_samples_are_the_same_for_any_number_of_processes(tmp_path):
    plan = HyPO().plan
    pair = load_pair(
        ModelConfig(name_or_path=str(save_model(tmp_path / "m"))),
        ReferenceConfig(),
        None,
        plan,
        fixed_data=False,
    )
    sampler = HFSampler(pair, max_new_tokens=4, seed=1)
    bundles = pairs(10)

    def collect(rank, world, step):
        rows = DatasetSource(bundles, plan, 4, seed=0, rank=rank, world=world)
        return SampledPairs(rows, sampler, plan, 8, Accelerator(cpu=True)).collect(step)

    whole = collect(0, 1, 3)
    for rank in range(2):
        for mine, same in zip(collect(rank, 2, 3), whole[rank::2], strict=True):
            assert mine.uid == same.uid
            assert len(mine.completions) == 4
            assert all(map(torch.equal, mine.completions, same.completions))
    plain = DatasetSource(bundles, plan, 4, seed=0).collect(3)
    assert all(torch.equal(a.completions[1], b.completions[1]) for a, b in zip(whole, plain))
    assert any(
        not torch.equal(a.completions[2], b.completions[2]) for a, b in zip(whole, collect(0, 1, 4))
    )


def test_judged_rows_hold_every_comparison_and_those_without_a_verdict_leave(tmp_path):
    plan = DRPO(samples=1).plan
    pair = load_pair(
        ModelConfig(name_or_path=str(save_model(tmp_path / "m"))),
        ReferenceConfig(),
        None,
        plan,
        fixed_data=False,
    )
    rows, invalid = DatasetSource(pairs(4), plan, 4, seed=0), pairs(4)[1].prompt.tolist()

    def judge(prompts, first, second):
        odds = torch.tensor([float(len(a) - len(b)) for a, b in zip(first, second)])
        return Verdict(odds.sigmoid(), torch.tensor([prompt != str(invalid) for prompt in prompts]))

    sampler = HFSampler(pair, max_new_tokens=4)
    source = SampledPairs(
        rows, sampler, plan, 8, Accelerator(cpu=True), judge, lambda ids: str(ids.tolist())
    )
    found = source.collect(0)
    assert len(found) == 3
    assert source.metrics["judge/invalid"] == 0.25
    for bundle in found:
        lengths = torch.tensor([float(len(str(ids.tolist()))) for ids in bundle.completions])
        torch.testing.assert_close(bundle.rows["table"], (lengths[:, None] - lengths).sigmoid())


def test_hypo_trains_with_samples_of_its_own_policy(tmp_path):
    objective = HyPO(beta=1.0, kl_weight=1.0, samples=2)
    job = make_job(save_model(tmp_path / "m"), tmp_path / "run", objective, pairs(16), steps=3)
    job.source = SampledPairs(
        job.source, HFSampler(job.pair, max_new_tokens=4), objective.plan, 8, job.accelerator
    )
    with job.run:
        train(job)
    kl = [row["kl/policy_reference_k1"] for row in read_jsonl(job.run.metrics_file)]
    assert abs(kl[0]) < 1e-6  # of the first step's samples: the policy is still the reference
    assert all(abs(value) > 1e-4 for value in kl[1:])
