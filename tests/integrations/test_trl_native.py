"""The same batches through alignkit's own loop and through the adapter: equal losses and gradients."""

from contextlib import suppress
from importlib import import_module

import pytest
import torch
from native_world import credited, gradient, grouped, move, native, pair_bundles, rollout
from trl import DPOTrainer, GRPOTrainer
from trl_world import dpo_trainer, grpo_trainer

from alignkit.batches import RolloutBatch
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

LIMIT = 1e-5


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
PAIRS += [DPO(weighting="wpo"), SimPO(weighting="wpo")]
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
    compare(trainer, inputs, pair, reducer.backward(pair_bundles(inputs)))


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
