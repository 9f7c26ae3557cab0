"""SLiC calibration: numbers by hand, SLiC-HF as the case of two candidates."""

import pytest
import torch
from world import run, save_model, write_rows

from alignkit.losses import slic_loss, slic_ranked_loss

F64 = torch.float64
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_by_hand():
    """Log-probs -2, -3, -2.5 and delta 1: the pairs are short of it by 0, 0.5 and 1.5."""
    logps = torch.tensor([[-2.0, -3.0, -2.5]], dtype=F64)
    rank = slic_ranked_loss(logps, ALL, delta=1.0, by_rank=False)
    assert float(rank) == pytest.approx((0.0 + 0.5 + 1.5) / 3, abs=1e-15)

    # The first and the last are two places apart, so 2 nats are asked of them.
    by_rank = slic_ranked_loss(logps, ALL, delta=1.0, by_rank=True)
    assert float(by_rank) == pytest.approx((0.0 + 1.5 + 1.5) / 3, abs=1e-15)


@pytest.mark.parametrize("by_rank", [False, True])
def test_two_candidates_are_slic(by_rank):
    logps = -5 * torch.rand(40, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    logps.requires_grad_()
    ours = slic_ranked_loss(logps, torch.ones(40, 2, dtype=torch.bool), delta=0.7, by_rank=by_rank)
    theirs = slic_loss(*logps.unbind(-1), delta=0.7)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    gradients = [
        torch.autograd.grad(loss.sum(), logps, retain_graph=True) for loss in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_short_rankings_count_their_own_candidates():
    logps = torch.tensor([[-2.0, -3.0, 0.0], [-1.0, 0.0, 0.0]], dtype=F64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert slic_ranked_loss(logps, mask, delta=2.0, by_rank=False).tolist() == [1.0, 0.0]


def test_rankings_train(tmp_path, capsys):
    save_model(tmp_path / "base")
    rows = [{"prompt": f"w{i}", "ranking": [" w5 w6", " w7", f" w8 w{i}"]} for i in range(3, 9)]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        "train.steps=12",
        "train.batch_size=6",
        "train.learning_rate=1e-2",
        "train.save_every=0",
    ]
    where = [f"model.name_or_path={tmp_path / 'base'}", f"data.train={tmp_path / 'rows.jsonl'}"]
    out = f"output_dir={tmp_path / 'run'}"
    assert run("train", "slic_ranked", *where, *words, out) == 0
    assert "rewards/accuracies 1" in capsys.readouterr().err
