"""Bregman top-k against every support, and mirostat against the identity that its bar obeys."""

from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import save_model

from alignkit.batches import Draw
from alignkit.errors import ConfigError
from alignkit.rollout import HFSampler
from alignkit.rollout.generate import OneModel
from alignkit.rollout.sparse import Mirostat, bregman_top_k

F64 = torch.float64


def distance(q, p, order):
    if order == 1:
        return float(torch.special.xlogy(q, q / p).sum())
    return float(((q - p) ** 2).sum() / 2)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("cost", [0.0, *(0.004 * 1.1**step for step in range(50))])
def test_it_is_the_best_of_all_sparse_laws(order, cost):
    """No other support, with the law that is best on it or near that, costs less."""
    noise = torch.Generator().manual_seed(0)
    p = (1.5 * torch.randn(5, dtype=F64, generator=noise)).softmax(-1)
    q = bregman_top_k(p.log()[None], cost, order)[0].exp()
    assert float(q.sum()) == pytest.approx(1, abs=1e-12)
    price = distance(q, p, order) + cost * int((q > 0).sum())
    for size in range(1, 6):
        for support in map(list, combinations(range(5), size)):
            law = torch.zeros(5, dtype=F64)
            law[support] = p[support] + (1 - p[support].sum()) / size
            if order == 1:
                law[support] = p[support] / p[support].sum()
            for push in (0.0, 1e-3):
                moved = law.clone()
                step = push * torch.randn(size, dtype=F64, generator=noise)
                moved[support] = (law[support] + step - step.mean()).clamp(min=1e-9)
                moved = moved / moved.sum()
                assert distance(moved, p, order) + cost * size >= price - 1e-12


def test_limits_of_the_price():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).log()
    for order in (1, 2):
        torch.testing.assert_close(bregman_top_k(p, 0.0, order), p, atol=1e-12, rtol=0)
        assert bregman_top_k(p, 9.0, order)[0].exp().tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="order 3"):
        bregman_top_k(p, 0.1, 3)


def test_mirostat_steers_the_surprise(tmp_path):
    """The mean surprise is the target plus what the bar moved by, and it comes near the target where
    plain samples are far above it.
    """
    save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = None
    models = OneModel(model, AutoTokenizer.from_pretrained(tmp_path))
    models.tokenizer.eos_token = None
    settings = {"max_new_tokens": 100, "seed": 1}
    plain, steered = (
        HFSampler(models, **settings, surprise=surprise).sample(
            [torch.tensor([5, 6])], Draw(4), step=0, prompt_ids=[0]
        )[0]
        for surprise in (None, 1.0)
    )
    rule = Mirostat(1.0)
    for sample in steered:
        assert len(sample.logps) == 100
        bar = rule.first(1, torch.device("cpu"))
        for logp in sample.logps:
            bar = rule.moved(bar, logp[None])
        gap = (2.0 - float(bar)) / (rule.rate * 100)
        assert float(-sample.logps.double().mean()) == pytest.approx(1.0 + gap, abs=1e-4)
        assert abs(gap) < 0.25
    assert min(float(-sample.logps.mean()) for sample in plain) > 1.5

    # A row's draws do not depend on the rows beside it.
    alone = HFSampler(models, **settings, surprise=1.0).sample(
        [torch.tensor([5, 6])], Draw(1), step=0, prompt_ids=[0]
    )
    assert torch.equal(alone[0][0].ids, steered[0].ids)
    with pytest.raises(ConfigError, match="must be above 0"):
        Mirostat(0.0)
