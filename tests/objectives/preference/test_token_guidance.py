"""Token-level guidance: a reward model and SFT are its limits; its rewards are of tokens."""

import math

import pytest
import torch
from torch.nn.functional import softplus
from world import run, save_model, write_rows

from alignkit.batches import Bundle, RankedBatch
from alignkit.errors import AlignkitError
from alignkit.losses import guided_sft_loss, plackett_luce_loss, token_rewards
from alignkit.objectives.preference.token_guidance import TokenGuidance
from alignkit.policies.reward_head import has_reward_head
from alignkit.rewards import load_reward_model
from alignkit.tensors import TokenLogps

F64 = torch.float64


def ranking_of(values, policy, mask):
    """The batch of one prompt whose completions are the rows, best first."""
    ids = [torch.zeros(int(row.sum()), dtype=torch.long) for row in mask]
    bundle = Bundle(torch.tensor([1]), ids, [torch.ones_like(i).bool() for i in ids], "0", {})
    return RankedBatch.build([bundle], TokenLogps(policy, {}, mask, extras={"values": values}))


def test_a_token_is_rewarded_by_the_value_that_has_read_it():
    """Own tokens at 0, 2 and 3: the first is read at 2, the second at 3, the end by none."""
    values = torch.tensor([[5.0, 9.0, 0.0, 1.0], [2.0, 3.0, 4.0, 5.0]], dtype=F64)
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    first, second = math.log(2), math.log1p(math.e)
    wanted = [[first, 0.0, second, (first + second) / 2], [1.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(
        token_rewards(values, mask), torch.tensor(wanted, dtype=F64), atol=1e-15, rtol=0
    )


def test_one_token_and_the_end_are_a_reward_model():
    """The loss and the gradient are Plackett-Luce's of what the head says at the end."""
    noise = torch.Generator().manual_seed(0)
    values = torch.randn(4, 2, dtype=F64, generator=noise).requires_grad_()
    policy = -torch.rand(4, 2, dtype=F64, generator=noise)
    batch = ranking_of(values, policy, torch.ones(4, 2, dtype=torch.bool))
    ranking, _ = TokenGuidance(scale=2.0).loss(batch).terms

    rewards = 2.0 * softplus(values[:, 1]).unsqueeze(0)
    wanted = plackett_luce_loss(rewards, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(ranking.values, wanted, atol=1e-14, rtol=0)
    ours, theirs = (
        torch.autograd.grad(loss.sum(), values, retain_graph=True)[0]
        for loss in (ranking.values, wanted)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_equal_rewards_are_sft_on_the_best_and_reach_no_value():
    noise = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    policy = torch.where(mask, -torch.rand(2, 3, dtype=F64, generator=noise), 0.0)
    values = torch.zeros(2, 3, dtype=F64).requires_grad_()
    _, guided = TokenGuidance().loss(ranking_of(values, policy, mask)).terms
    assert float(guided.values) == pytest.approx(float(-policy[0].mean()), abs=1e-15)
    assert not guided.values.requires_grad


def test_by_hand():
    """Rewards 3 and 1: three quarters of the first token's log-prob, one of the second's."""
    policy, rewards = torch.tensor([[-1.0, -2.0]]), torch.tensor([[3.0, 1.0]])
    loss = guided_sft_loss(policy, rewards, torch.ones(1, 2, dtype=torch.bool))
    assert float(loss) == pytest.approx(0.75 * 1 + 0.25 * 2)


def test_a_planted_token_reward_comes_back():
    """Completions of two words and an end; words are worth 2 or 0. Rankings by their mean are
    explained by rewards that tell the two kinds of words apart, though no token was labelled.
    """
    words = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    worth = torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=F64)[words]
    order = worth.mean(-1).argsort(descending=True, stable=True)
    better, worse = torch.combinations(order).unbind(-1)
    differ = worth[better].mean(-1) > worth[worse].mean(-1)
    pairs = torch.stack([better, worse], -1)[differ]

    table = torch.zeros(4, dtype=F64, requires_grad=True)  # what the head says after a word
    mask = torch.ones(16, 3, dtype=torch.bool)
    for _ in range(60):
        values = torch.cat([torch.zeros(16, 1, dtype=F64), table[words]], -1)
        means = token_rewards(values, mask)[:, -1]
        loss = plackett_luce_loss(means[pairs], torch.ones_like(pairs, dtype=torch.bool)).mean()
        (grad,) = torch.autograd.grad(loss, table)
        table = (table - 3 * grad).detach().requires_grad_()
    assert float((table[:2].min() - table[2:].max()).detach()) > 1
    assert float((table[0] - table[1]).detach().abs()) < 1e-9


def test_rankings_train_and_leave_a_language_model_alone(tmp_path, capsys):
    """The head's rewards are of tokens, so the model does not pass for a reward model."""
    save_model(tmp_path / "base")
    rows = [{"prompt": f"w{i}", "ranking": [" w5 w6", " w7", f" w8 w{i}"]} for i in range(3, 9)]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        f"model.name_or_path={tmp_path / 'base'}",
        f"data.train={tmp_path / 'rows.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "train.steps=15",
        "train.batch_size=6",
        "train.learning_rate=1e-2",
        "train.save_every=0",
    ]
    assert run("train", "token_guidance", *words) == 0
    assert "rewards/accuracies 1" in capsys.readouterr().err

    model = tmp_path / "run" / "model"
    assert not has_reward_head(model)
    with pytest.raises(AlignkitError):
        load_reward_model(str(model))
