"""T-REG: its gradient is DPO's with every token weighed by its reward, which the reference gives
after two contrasting texts.
"""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from world import save_model

from alignkit import TREG
from alignkit.batches import PairBatch
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError
from alignkit.oracles.worlds import TabularWorld
from alignkit.policies.load import load_pair
from alignkit.runs.context import RunContext
from alignkit.runs.job_data import fixed_data


def test_the_gradient_weighs_every_token_by_its_reward():
    beta, alpha = 0.7, 0.4
    objective = TREG(beta=beta, alpha=alpha)
    world = TabularWorld.build(objective.plan)
    tokens = world.tokens().map(torch.Tensor.detach)
    policy = tokens.policy.requires_grad_()
    batch = PairBatch.build(world.bundles, tokens)
    loss = sum(term.weight * term.values.sum() for term in objective.loss(batch).terms)
    ratio = (policy - tokens.reference).sum(-1).view(-1, 2)  # chosen, rejected
    wrong = (beta * (ratio[:, 1] - ratio[:, 0])).sigmoid().repeat_interleave(2).unsqueeze(-1)
    side = torch.tensor([1.0, -1.0]).repeat(len(world.bundles)).unsqueeze(-1)
    reward = (tokens.get("better") - tokens.get("worse")).sigmoid() - 0.5
    wanted = torch.where(world.mask, -beta * wrong * (side + alpha * reward), 0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], wanted, atol=1e-14, rtol=0)


def test_the_reference_scores_after_each_text(tmp_path):
    path = save_model(tmp_path / "m")
    rows = '{"prompt": "w3 w4", "chosen": "w5 w6", "rejected": "w7"}\n' * 2
    (tmp_path / "pairs.jsonl").write_text(rows)
    paths = [
        f"model.name_or_path={path}",
        f"data.train={tmp_path / 'pairs.jsonl'}",
        "train.batch_size=2",
    ]
    objective = TREG(better="w8 w9", worse="w10")
    pair = load_pair(
        ModelConfig(name_or_path=str(path)),
        ReferenceConfig(),
        None,
        objective.plan,
        fixed_data=True,
    )
    recipe = load_recipe("treg", [*paths, "train.micro_batch_tokens=4096"])
    context = RunContext(recipe, objective, None, pair, Accelerator(cpu=True), safe=True)
    (bundle, _) = fixed_data(context).source.collect(0)
    assert [len(name) for name in bundle.tokens["better"]] == [
        len(ids) for ids in bundle.completions
    ]
    for name, text in objective.plan.prefixes.items():
        ahead = torch.tensor(pair.tokenizer(text, add_special_tokens=False).input_ids)
        for ids, found in zip(bundle.completions, bundle.tokens[name]):
            whole = torch.cat([ahead, bundle.prompt, ids])
            with pair.model("policy") as model, torch.no_grad():
                logps = (
                    model(whole[None])
                    .logits[0]
                    .log_softmax(-1)[:-1]
                    .gather(-1, whole[1:, None])[-len(ids) :, 0]
                )
            torch.testing.assert_close(found, logps, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"objective\.worse: the tokenizer makes no token of ' '"):
        fixed_data(replace(context, objective=TREG(worse=" ")))
