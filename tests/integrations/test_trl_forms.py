"""Forms of losses that TRL has and its adapter does not carry, or that are alignkit's own loop's:
the same batch gives TRL's trainer and alignkit's loop the same loss and gradient.
"""

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from native_world import credited, gradient, grouped, move, native, rollout, row_bundle
from packaging.version import Version
from transformers import AutoTokenizer
from trl import GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl_world import COMMON, PAIRS, grpo_trainer, policy

from alignkit import GRPO, KTO, SFT
from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.objectives.exploration import on_policy_enough

pytestmark = pytest.mark.skipif(
    Version(version("trl")) < Version("1.16"), reason="alignkit's forms are held against TRL 1.16"
)

LIMIT = 1e-6


def trl_loss(trainer, inputs):
    """TRL's own loss of a batch, with its gradient left in the model."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach())


def check_equal(trainer, loss, pair, metrics):
    assert loss == pytest.approx(metrics["loss"], rel=LIMIT, abs=LIMIT)
    theirs, ours = gradient(trainer.model), gradient(pair.base.model)
    assert ours.norm() > 1e-3
    assert (theirs - ours).norm() < LIMIT * max(1.0, float(ours.norm()))


@pytest.mark.parametrize("form", ["nll", "dft"])
def test_sft(model, tmp_path, form):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    args = SFTConfig(**COMMON, output_dir=str(tmp_path), loss_type=form)
    trainer = SFTTrainer(
        policy(model, "full"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    pair, reducer = native(model, SFT(form=form))
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, trained = inputs["input_ids"], inputs["labels"] != -100
    real = inputs["attention_mask"].bool()
    bundles = [row_bundle(ids, trained, real, row) for row in range(len(ids))]
    check_equal(trainer, trl_loss(trainer, dict(inputs)), pair, reducer.backward(bundles))


def test_kto_without_a_baseline_is_apo_zero_unpaired(model, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS[:4]
        for side in ("chosen", "rejected")
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    settings = {"loss_type": "apo_zero_unpaired", "beta": 0.3, "per_device_train_batch_size": 8}
    trainer = KTOTrainer(
        policy(model, "full"),
        args=KTOConfig(**COMMON, **settings, **weights, output_dir=str(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    pair, reducer = native(model, KTO(form="apo_zero_unpaired", beta=0.3, **weights))
    move(pair.base.model, trainer.model)

    inputs = next(iter(trainer.get_train_dataloader()))
    ids, mask = inputs["input_ids"], inputs["completion_mask"].bool()
    real = inputs["attention_mask"].bool()
    labels = torch.as_tensor(inputs["label"])
    bundles = [
        row_bundle(ids, mask, real, row, label=labels[row : row + 1]) for row in range(len(ids))
    ]
    check_equal(trainer, trl_loss(trainer, inputs), pair, reducer.backward(bundles))


@pytest.mark.parametrize(
    ("objective", "theirs"),
    [
        (GRPO(beta=0.1, kl="k3_weighted"), {"use_bias_correction_kl": True}),
        (GRPO(beta=0, entropy_weight=0.3), {"entropy_coef": 0.3}),
        (GRPO(beta=0.1, off_policy_threshold=0.02), {"off_policy_mask_threshold": 0.02}),
    ],
    ids=["kl", "entropy", "off_policy"],
)
def test_grpo_at_another_temperature(model, tmp_path, objective, theirs):
    """TRL samples at 0.7 and trains on tempered log-probs; so does alignkit on the same rollout."""
    trainer = grpo_trainer(
        GRPOTrainer,
        model,
        tmp_path,
        beta=objective.beta,
        per_device_train_batch_size=8,
        temperature=0.7,
        **theirs,
    )
    pair, reducer = native(model, objective, temperature=0.7)
    inputs = rollout(trainer)
    move(pair.base.model, trainer.model)  # after sampling: ratio and KL are not trivial
    bundles, order = grouped(trainer, inputs)
    inputs = {
        name: value[order] if torch.is_tensor(value) and value.dim() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        tokens = pair.logps(bundles, objective.plan)
    drift = 0.2 * torch.randn(tokens.policy.shape, generator=torch.Generator().manual_seed(1))
    behavior = (tokens.policy + drift).where(tokens.mask, 0.0)
    inputs["old_per_token_logps"] = behavior
    if objective.beta:
        torch.testing.assert_close(
            inputs["ref_per_token_logps"].where(tokens.mask, 0.0),
            tokens.reference,
            atol=2e-6,
            rtol=0,
        )
    filled = credited(objective, bundles, tokens, behavior)
    metrics = reducer.backward(filled)
    if objective.off_policy_threshold is not None:
        assert 0 < metrics["off_policy_masked"] < 1
    check_equal(trainer, trl_loss(trainer, inputs), pair, metrics)


def test_the_off_policy_mask_is_trls():
    generator = torch.Generator().manual_seed(0)
    policy, behavior = -torch.rand(2, 40, 5, generator=generator)
    advantages = torch.randn(40, 1, generator=generator).expand(40, 5)
    mask = torch.rand(40, 5, generator=generator) < 0.7
    theirs = GRPOTrainer.get_off_policy_mask(advantages, policy, behavior, mask.float(), 0.05)
    ours = on_policy_enough(policy, behavior, advantages, mask, threshold=0.05)
    assert 0 < int(theirs[:, 0].sum()) < 40
    assert torch.equal(ours, theirs.bool())


def test_truncated_completions_teach_nothing():
    """TRL's `mask_truncated_completions`: an empty mask, whose row still counts in GRPO's mean."""
    mask = torch.tensor([[True, True], [False, False]])
    logps = torch.zeros(2, 2).requires_grad_()
    tokens = TokenLogps(logps, {}, mask, torch.zeros(2, 2))
    batch = RolloutBatch(tokens, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    objective = GRPO(beta=0, scale_by_std=False)
    credited_batch, _ = objective.credit(batch, {})
    assert credited_batch.advantages.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    (term,) = objective.loss(replace(credited_batch, tokens=tokens)).terms
    (slope,) = torch.autograd.grad(term.values.sum() / 2, logps)
    assert slope.tolist() == [[-0.125, -0.125], [0.0, 0.0]]
