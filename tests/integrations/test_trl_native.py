"""The same batches through alignkit's own loop and through the adapter: equal losses and gradients."""

from contextlib import suppress
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from accelerate import Accelerator
from trl import DPOTrainer, GRPOTrainer
from trl_world import dpo_trainer, grpo_trainer, letters

from alignkit.batches import Bundle, RolloutBatch
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.errors import ConfigError
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives import OBJECTIVES, locate
from alignkit.objectives.online.dapo import DAPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.fdpo import FDPO
from alignkit.objectives.preference.hdpo import HDPO
from alignkit.objectives.preference.ipo import IPO
from alignkit.objectives.preference.radpo import RaDPO
from alignkit.objectives.preference.simpo import SimPO
from alignkit.objectives.preference.tdpo import TDPO
from alignkit.policies.load import load_pair
from alignkit.training.reduction import Reducer

LIMIT = 1e-5


def native(model, objective):
    """alignkit's policy pair with a frozen reference, and its reducer."""
    config, accelerator = ModelConfig(name_or_path=str(model)), Accelerator(cpu=True)
    pair = load_pair(
        config, ReferenceConfig(kind="frozen"), None, objective.plan, device="cpu", fixed_data=True
    )
    pair.prepare(accelerator, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return pair, Reducer(objective, pair, accelerator, 4096)


def move(*modules):
    """Away from the reference, all in the same direction, so that every part of a loss counts."""
    for module in modules:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def compare(trainer, inputs, pair, metrics, size=0.0):
    """Loss (to the rounding of terms of `size`), gradient and metrics."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(metrics["loss"], rel=LIMIT, abs=LIMIT * size)
    theirs, ours = gradient(trainer.model), gradient(pair.base.model)
    assert ours.norm() > 1e-3
    assert (theirs - ours).norm() < LIMIT * ours.norm()
    trainer.log({"loss": 0.0})
    logged = trainer.state.log_history[-1]
    for name, value in metrics.items():  # the same names and figures
        if name not in ("loss", "grad_norm"):
            assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def fitting(base, most):
    """Up to `most` settings of each built-in objective that `base` can train."""
    for name in OBJECTIVES:
        module, cls, _ = locate(name)
        found = []
        for setting in getattr(import_module(module), cls).examples():
            with suppress(ConfigError):
                as_trl_trainer(setting, base)
                found.append(setting)
        yield from found[:most]


PAIRS = [o for o in fitting(DPOTrainer, 2) if o.plan.data == "pair"]
ROLLOUTS = [
    *fitting(GRPOTrainer, 1),
    DAPO(drop_constant=False),
    RPG(kl_credit="token"),
    RPG(anchor="behavior", kl_credit="token"),
    GRPO(beta=0.1, kl="k3", scale_by_std=False),
]


def name(objective):
    changed = objective.model_dump(exclude_defaults=True)
    return "-".join([type(objective).__name__, *(f"{k}={v}" for k, v in changed.items())])


def test_the_promised_ones_fit():
    assert {DPO, IPO, FDPO, HDPO, TDPO, RaDPO, SimPO} <= {type(o) for o in PAIRS}
    assert {GRPO, RPG} <= {type(o) for o in ROLLOUTS}


@pytest.mark.parametrize("objective", PAIRS, ids=name)
def test_pair_objectives(model, tmp_path, objective):
    trainer = dpo_trainer(as_trl_trainer(objective), model, tmp_path, per_device_train_batch_size=4)
    pair, reducer = native(model, objective)
    move(pair.base.model, trainer.model)
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, mask, real = (
        inputs["input_ids"],
        inputs["completion_mask"].bool(),
        inputs["attention_mask"].bool(),
    )
    half, bundles = len(ids) // 2, []
    for c in range(half):
        start = int(mask[c].float().argmax())
        sides = [(ids[r][real[r]][start:], mask[r][real[r]][start:]) for r in (c, c + half)]
        bundles.append(Bundle(ids[c, :start], [s[0] for s in sides], [s[1] for s in sides]))
    compare(trainer, inputs, pair, reducer.backward(bundles))


class Caught(Exception):
    """Carries a rollout out of `train`."""


def rollout(trainer):
    """The first rollout that TRL samples, scores and collates."""

    def catch(model, inputs, **_):
        raise Caught(inputs)

    own, trainer.compute_loss = trainer.compute_loss, catch
    with pytest.raises(Caught) as caught:
        trainer.train()
    trainer.compute_loss, trainer.current_gradient_accumulation_steps = own, 1
    return caught.value.args[0]


def grouped(trainer, inputs):
    """TRL's rows as bundles with their scores, and the rows' order in them."""
    prompts = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"])
    ]
    bundles, order = [], []
    for prompt in sorted(set(prompts)):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        order += rows
        completions = [
            inputs["completion_ids"][i][inputs["completion_mask"][i].bool()] for i in rows
        ]
        texts = trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
        masks = [torch.ones(len(c), dtype=torch.bool) for c in completions]
        bundles.append(
            Bundle(
                torch.tensor(prompt),
                completions,
                masks,
                rows={"score": torch.tensor(letters(texts))},
            )
        )
    return bundles, torch.tensor(order)


def credited(objective, bundles, tokens, behavior):
    """The bundles with behaviour log-probs and the objective's own advantages, as alignkit's loop
    fills them in.
    """
    scores = torch.cat([b.rows["score"] for b in bundles])
    groups = torch.tensor([i for i, b in enumerate(bundles) for _ in b.completions])
    filled, _ = objective.credit(
        RolloutBatch(replace(tokens, behavior=behavior), scores, groups), {}
    )
    result, at = [], 0
    for bundle in bundles:
        lengths = [len(c) for c in bundle.completions]
        channels = {"behavior": behavior, "advantages": filled.advantages, **tokens.anchors}
        rows = {
            name: [values[at + k, :n] for k, n in enumerate(lengths)]
            for name, values in channels.items()
        }
        result.append(replace(bundle, tokens=rows))
        at += len(lengths)
    return result


@pytest.mark.parametrize("objective", ROLLOUTS, ids=name)
def test_rollout_objectives(model, tmp_path, objective):
    cls = as_trl_trainer(objective, GRPOTrainer)
    trainer = grpo_trainer(cls, model, tmp_path, per_device_train_batch_size=8, temperature=1.0)
    pair, reducer = native(model, objective)
    move(pair.base.model, trainer.model)
    inputs = rollout(trainer)
    bundles, order = grouped(trainer, inputs)
    assert [len(b.completions) for b in bundles] == [4, 4]
    inputs = {
        name: value[order] if torch.is_tensor(value) and value.dim() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        tokens = pair.logps(bundles, objective.plan)
    drift = 0.2 * torch.randn(tokens.policy.shape, generator=torch.Generator().manual_seed(1))
    # ratios that are not 1
    inputs["old_per_token_logps"] = behavior = (tokens.policy + drift).where(tokens.mask, 0.0)
    filled = credited(objective, bundles, tokens, behavior)
    terms = objective.loss(RolloutBatch.build(filled, pair.logps(filled, objective.plan))).terms
    size = max(float(term.values.abs().max()) for term in terms)  # they cancel
    compare(trainer, inputs, pair, reducer.backward(filled), size)
