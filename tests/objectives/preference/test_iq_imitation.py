"""IQ-imitation: without the penalty it is `sft` bit for bit, and its token rewards are the planted ones
up to a shaping term.
"""

import torch
from safetensors.torch import load_file
from torch import Tensor
from world import run, save_model, write_rows

from alignkit.losses import iq_rewards
from alignkit.objectives.preference.iq_imitation import discounts
from alignkit.oracles.optima import minimise
from alignkit.policies.tabular import Tree

F64 = torch.float64


def test_lambda_0_is_sft_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    rows = [{"prompt": f"w{3 + i} w4", "completion": f" w5 w{6 + i}"} for i in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    common = [
        "model.name_or_path=model",
        "data.train=rows.jsonl",
        "train={steps: 4, batch_size: 4, warmup_steps: 0, learning_rate: 1.0e-2, save_every: 0, "
        "eval_every: 0, log_samples_every: 0}",
    ]
    names = {
        "sft": "{name: sft}",
        "iq": "{name: iq_imitation, lam: 0}",
        "penalised": "{name: iq_imitation}",
    }
    for name, objective in names.items():
        assert run("train", "sft", f"objective={objective}", f"output_dir={name}", *common) in (
            0,
            None,
        )
    weights = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in names}
    assert all(torch.equal(weights["sft"][key], weights["iq"][key]) for key in weights["sft"])
    assert not all(
        torch.equal(weights["sft"][key], weights["penalised"][key]) for key in weights["sft"]
    )


def test_the_discounted_rewards_telescope():
    """sum gamma^t (r_t - V_t + gamma V_{t+1}) = sum gamma^t log pi: the step from inverse soft-Q to a
    likelihood, with masks that end early.
    """
    noise = torch.Generator().manual_seed(0)
    logps, values = -torch.rand(2, 3, 5, dtype=F64, generator=noise)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    logps, gamma = logps.where(mask, 0.0), 0.7
    rewards = iq_rewards(logps, values, mask, gamma=gamma)
    own = values.where(mask, 0.0)
    later = torch.nn.functional.pad(own[:, 1:], (0, 1))
    weights = discounts(mask, gamma)
    left = (weights * (rewards - own + gamma * later) * mask).sum(-1)
    torch.testing.assert_close(left, (weights * logps).sum(-1), atol=1e-12, rtol=0)


def soft_values(tree: Tree, rewards: Tensor, gamma: float) -> Tensor:
    """Q* [S, V] of token rewards [S, V]: r + gamma logsumexp of the next state's, 0 after the end."""
    values = torch.zeros_like(rewards)
    for _ in range(tree.prefixes.shape[-1]):
        following = torch.zeros_like(rewards)
        for path, ids, mask in zip(tree.prefixes, tree.tokens, tree.mask):
            states = path[mask].tolist()
            for t in range(len(states) - 1):
                following[states[t], ids[t]] = values[states[t + 1]].logsumexp(-1)
        values = rewards + gamma * following
    return values


def test_the_planted_rewards_come_back_up_to_shaping():
    """Demonstrations of the soft optimum of planted token rewards; the minimiser of the exact loss
    under a small penalty. Shaping changes the discounted sum of every path by the same constant.
    """
    tree, gamma, lam = Tree.build(3, 2, eos=False), 0.8, 1e-5
    noise = torch.Generator().manual_seed(0)
    planted = torch.randn(tree.states, 3, dtype=F64, generator=noise)
    expert = tree.logps(soft_values(tree, planted, gamma)).sum(-1).exp()
    weights = discounts(tree.mask, gamma)

    def extracted(theta: Tensor) -> Tensor:
        partition = theta.logsumexp(-1)[tree.prefixes]
        return iq_rewards(tree.logps(theta), partition, tree.mask, gamma=gamma)

    def loss(theta: Tensor) -> Tensor:
        paths = weights * (-tree.logps(theta) + lam * extracted(theta) ** 2)
        return (expert * paths.sum(-1)).sum()

    theta = minimise(loss, torch.zeros(tree.states, 3, dtype=F64))
    given = planted[tree.prefixes, tree.tokens]
    gap = (weights * (extracted(theta) - given)).sum(-1)
    torch.testing.assert_close(gap, gap[:1].expand_as(gap), atol=1e-3, rtol=0)
    assert float((given - given.mean()).abs().max()) > 1
