"""Several models that sample each token together: the law of the tokens, and its exact KL."""

import pytest
import torch
from small_models import EOS, enumerate_completions, models_of, next_logits, small_model

from alignkit.batches import Draw
from alignkit.kl import exact
from alignkit.rollout.hf import HFSampler

PROMPT = torch.tensor([2, 3, 1])
POLICY = small_model(seed=1)
REFERENCE = small_model(seed=2)

FUSIONS = {
    "DeRa beyond the policy": {"policy": 1.5, "reference": -0.5},
    "a sum that is not 1": {"policy": 0.5, "reference": 1.0},
    "the policy alone": {},
}


def fused(weights):
    def logprobs(ids):
        models = {"policy": POLICY, "reference": REFERENCE}
        parts = [w * next_logits(models[name], ids) for name, w in weights.items()]
        return torch.stack(parts).sum(0).log_softmax(-1)

    return logprobs


@pytest.mark.parametrize("weights", FUSIONS.values(), ids=FUSIONS)
def test_a_fusion_follows_its_law_and_measures_its_kl(weights):
    draw = Draw(3000, weights=weights)
    sampler = HFSampler(models_of(POLICY, REFERENCE), max_new_tokens=3, measured=True)
    samples = sampler.sample([PROMPT], draw, step=0, prompt_ids=[0])[0]

    law = fused(draw.models)
    reference = fused({"reference": 1.0})
    q = enumerate_completions(law, PROMPT.tolist(), 3)
    p = enumerate_completions(reference, PROMPT.tolist(), 3)
    kl = sum(q[y] * float(torch.tensor(q[y] / p[y]).log()) for y in q)
    summed = torch.tensor([float(sample.kl.sum()) for sample in samples])
    assert abs(float(summed.mean()) - kl) < 4 * float(summed.std()) / len(samples) ** 0.5

    # Step by step the numbers are those of the two laws.
    for sample in samples[:40]:
        ids = PROMPT.tolist()
        for place, token in enumerate(sample.ids.tolist()):
            step = law(ids)
            anchor = reference(ids)
            assert float(sample.kl[place]) == pytest.approx(float(exact(step, anchor)), abs=1e-5)
            assert float(sample.logps[place]) == pytest.approx(float(step[token]), abs=1e-5)
            assert float(sample.reference_logps[place]) == pytest.approx(
                float(anchor[token]), abs=1e-5
            )
            ids.append(token)
        assert sample.ended == (sample.ids[-1] == EOS)


def test_reading_along_changes_no_sample():
    models = models_of(POLICY, REFERENCE)
    plain = HFSampler(models, max_new_tokens=4)
    measured = HFSampler(models, max_new_tokens=4, measured=True)
    for one, other in zip(
        plain.sample([PROMPT], Draw(50), step=3, prompt_ids=[5])[0],
        measured.sample([PROMPT], Draw(50), step=3, prompt_ids=[5])[0],
    ):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.logps, other.logps)
        assert one.kl is None
        assert other.kl is not None
