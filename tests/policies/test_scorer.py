"""A scorer in training: its outputs, and what it refuses."""

import pytest
import torch
from tiny_models import bundle, random_bundles, write_model

from alignkit.batches import Outputs, Plan, ScoredBatch, batch_type
from alignkit.config.model import AdapterConfig, ModelConfig
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.policies.load_scorer import load_scorer
from alignkit.policies.scorer import joined
from alignkit.training.guard import Guard

THREE = Plan("ranked", anchors=(), outputs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer(ModelConfig(name_or_path=str(folder)), THREE)


def test_outputs_do_not_depend_on_the_batch(scorer):
    bundles = random_bundles(0)
    together = scorer.scores(bundles).values
    alone = torch.cat([scorer.scores([one]).values for one in bundles])
    assert together.shape == (sum(len(one.completions) for one in bundles), 3)
    assert together.requires_grad
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert len(together.unique(dim=0)) == len(together), "every completion has outputs of its own"


def test_the_loop_gets_outputs_and_nobody_gets_log_probs(scorer):
    bundles = random_bundles(1)
    seen = scorer.forward(bundles, THREE)
    assert isinstance(seen, Outputs)
    with pytest.raises(ModelError, match="it has no log-probs"):
        scorer.logps(bundles, THREE)

    batch = batch_type(THREE).build(bundles, seen)
    assert isinstance(batch, ScoredBatch)
    assert batch.sizes.tolist() == [len(one.completions) for one in bundles]
    assert torch.equal(batch.outputs, seen.values)


def test_outputs_that_are_not_finite_are_counted():
    guard = Guard(torch.device("cpu"))
    bundles = [bundle([3], [[4], [5]])]
    guard.watch_outputs(Outputs(torch.zeros(2, 3)), bundles)
    assert float(guard.broken) == 0
    guard.watch_outputs(Outputs(torch.tensor([[0.0, 1.0], [2.0, float("nan")]])), bundles)
    assert float(guard.broken) == 1


def test_chosen_and_rejected_outputs():
    outputs = Outputs(torch.arange(8.0).reshape(4, 2))
    bundles = [bundle([3], [[4], [5]])] * 2
    chosen, rejected = ScoredBatch.build(bundles, outputs).pairs()
    assert chosen.tolist() == [[0, 1], [4, 5]]
    assert rejected.tolist() == [[2, 3], [6, 7]]


def test_both_orders_of_a_preference_pair():
    both = joined(bundle([3, 4], [[5], [6, 7]]), separator=9)
    assert [ids.tolist() for ids in both.completions] == [[5, 9, 6, 7], [6, 7, 9, 5]]
    assert both.prompt.tolist() == [3, 4]
    assert all(mask.all() for mask in both.masks)


def test_refusals(folder, scorer):
    with pytest.raises(DataError, match=r"a row has \d+ tokens, the model reads at most"):
        scorer.scores([bundle([3] * scorer.longest, [[4]])])
    config = ModelConfig(name_or_path=str(folder), adapter=AdapterConfig(r=2))
    with pytest.raises(ConfigError, match="trained whole"):
        load_scorer(config, THREE)
