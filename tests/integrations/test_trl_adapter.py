"""Contract with TRL's trainers: the adapter around DPO and GRPO equals TRL's own loss, and what does not fit is refused."""

import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from world import save_model

from alignkit import integrations
from alignkit.errors import ConfigError, DataError
from alignkit.integrations import trl as adapter
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.base import Weighted
from alignkit.objectives.dpo import DPO
from alignkit.objectives.fdpo import FDPO
from alignkit.objectives.grpo import GRPO
from alignkit.objectives.hdpo import HDPO
from alignkit.objectives.kl_ppo import KLPPO
from alignkit.objectives.kto import KTO
from alignkit.objectives.radpo import RaDPO
from alignkit.objectives.rpg import RPG
from alignkit.objectives.sft import SFT

STEPS = 4
COMMON = {
    "max_steps": STEPS, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "save_strategy": "no", "disable_tqdm": True, "seed": 3, "learning_rate": 2e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama, and beside it a LoRA adapter that does something."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return folder


def words(seed, n):
    ids = torch.randint(3, 23, (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


PAIRS = [
    {"prompt": words(i, 2 + i % 4), "chosen": " " + words(50 + i, 1 + i % 5), "rejected": " " + words(99 + i, 1 + i % 3)}
    for i in range(8)
]


def curve(trainer):
    trainer.train()
    return torch.tensor([(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "grad_norm" in r], dtype=torch.float64)


def policy(folder, tune):
    base = AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True) if tune == "pretrained" else base


def dpo_trainer(cls, folder, out, accumulation=1, tune="full", precompute=False, **settings):
    args = DPOConfig(
        output_dir=str(out), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        precompute_ref_log_probs=precompute, **COMMON, **settings,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if tune == "new" else None
    return cls(
        policy(folder, tune), args=args, train_dataset=Dataset.from_list(PAIRS), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("accumulation", "tune", "precompute"), list(itertools.product([1, 2], ["full", "new", "pretrained"], [False, True]))
)
def test_dpo_equals_trls_own(model, tmp_path, accumulation, tune, precompute):
    case = (model, tmp_path, accumulation, tune, precompute)
    native = curve(dpo_trainer(DPOTrainer, *case))
    ours = curve(dpo_trainer(as_trl_trainer(DPO(beta=0.1)), *case))
    assert len(ours) == STEPS
    if tune != "pretrained" or not precompute:
        assert ours[0, 0] == pytest.approx(0.6931472, abs=1e-6)  # the reference is where training began
    torch.testing.assert_close(ours, native, rtol=1e-6, atol=1e-7)


def letters(completions, **_):
    return [float(text.count("1")) + 0.01 * len(text) for text in completions]


def grpo_trainer(cls, folder, out, accumulation=1, beta=0.0, **settings):
    args = GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, num_generations=4,
        max_completion_length=5, beta=beta, temperature=0.9, loss_type="grpo", **COMMON, **settings,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    return cls(
        policy(folder, "full"), reward_funcs=letters, args=args, train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("accumulation", "beta", "corrected"), [(1, 0.0, False), (1, 0.1, True), (2, 0.1, False), (2, 0.1, True)]
)
def test_grpo_equals_trls_own(model, tmp_path, accumulation, beta, corrected):
    settings = {"use_bias_correction_kl": corrected}
    native = curve(grpo_trainer(GRPOTrainer, model, tmp_path, accumulation, beta, **settings))
    objective = GRPO(beta=beta, kl="k3_weighted" if corrected else "k3")
    ours = curve(grpo_trainer(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, accumulation, beta, **settings))
    assert ours[:, 1].abs().max() > 0
    torch.testing.assert_close(ours, native, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "objective",
    [FDPO(beta=0.2, divergence="jensen_shannon"), HDPO(beta=0.2, alpha=0.9), RaDPO(beta=0.2, risk="cvar", level=0.7)],
    ids=lambda o: type(o).__name__,
)
def test_other_pair_objectives_equal_the_native_loss(model, tmp_path, objective):
    """The same batches through PolicyPair and objective.loss: first step's loss and gradient."""
    from alignkit.batches import Bundle, PairBatch
    from alignkit.policies.config import ModelConfig, ReferenceConfig
    from alignkit.policies.load import load_pair

    trainer = dpo_trainer(as_trl_trainer(objective), model, tmp_path)
    pair = load_pair(
        ModelConfig(name_or_path=str(model)), ReferenceConfig(kind="frozen"), None, objective.plan, device="cpu", fixed_data=True
    )
    with torch.no_grad():  # away from the reference, so that every part of the loss counts
        generator = torch.Generator().manual_seed(0)
        for own, theirs in zip(pair.base.model.parameters(), trainer.model.parameters(), strict=True):
            noise = 0.05 * torch.randn(own.shape, generator=generator)
            own.add_(noise), theirs.add_(noise)
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, mask, real = inputs["input_ids"], inputs["completion_mask"].bool(), inputs["attention_mask"].bool()
    half, bundles = len(ids) // 2, []
    for c in range(half):
        start = int(mask[c].float().argmax())
        sides = [(ids[r][real[r]][start:], mask[r][real[r]][start:]) for r in (c, c + half)]
        bundles.append(Bundle(ids[c, :start], [s[0] for s in sides], [s[1] for s in sides]))
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    ours = objective.loss(PairBatch.build(bundles, pair.logps(bundles, objective.plan))).terms[0].values.mean()
    ours.backward()
    assert float(theirs.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)
    for own, other in zip(pair.base.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-6)


def test_rpg_trains_on_grpo_trainer_and_logs_its_own_metrics(model, tmp_path):
    cls = as_trl_trainer(RPG(anchor="behavior", beta=0.01), GRPOTrainer)
    assert cls.__name__ == "RPGGRPOTrainer"
    trainer = grpo_trainer(cls, model, tmp_path, num_iterations=2, steps_per_generation=1, scale_rewards="none")
    rows = curve(trainer)
    assert rows.isfinite().all()
    assert any("kl/behavior_policy_k3" in r for r in trainer.state.log_history)
    exact = grpo_trainer(as_trl_trainer(RPG(kl_credit="token", beta=0.1), GRPOTrainer), model, tmp_path / "exact")
    assert curve(exact).isfinite().all()
    assert any("kl/policy_reference_exact" in r for r in exact.state.log_history)


def test_a_weighted_list_and_metrics_on_dpo_trainer(model, tmp_path):
    objective = Weighted(parts=[(DPO(beta=0.1), 1.0), (SFT(), 0.1)])
    trainer = dpo_trainer(as_trl_trainer(objective), model, tmp_path)
    assert curve(trainer).isfinite().all()
    assert {"rewards/chosen", "rewards/margins", "nll"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize(
    ("objective", "base", "message"),
    [
        (KTO(), DPOTrainer, "learns from labelled data.*alignkit's own loop"),
        (GRPO(), DPOTrainer, "use base=GRPOTrainer"),
        (DPO(), GRPOTrainer, "use base=DPOTrainer"),
        (KLPPO(), GRPOTrainer, "a value head"),
        (RPG(), GRPOTrainer, "set kl_credit=token"),
        (DPO, DPOTrainer, "give an instance"),
        (DPO(), dict, "allowed are DPOTrainer"),
    ],
)
def test_what_does_not_fit_is_refused(objective, base, message):
    with pytest.raises(ConfigError, match=message):
        as_trl_trainer(objective, base)


def test_arguments_that_would_be_ignored_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"args\.beta is 0\.3, the objective's is 0\.2"):
        dpo_trainer(as_trl_trainer(DPO(beta=0.2)), model, tmp_path, beta=0.3)
    with pytest.raises(ConfigError, match="loss_type"):
        dpo_trainer(as_trl_trainer(DPO(beta=0.2)), model, tmp_path, loss_type="ipo")
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        dpo_trainer(as_trl_trainer(RaDPO()), model, tmp_path, precompute=True)
    trainer = dpo_trainer(as_trl_trainer(DPO(beta=0.2)), model, tmp_path)
    assert trainer.args.beta == 0.2  # one beta: the objective's
    with pytest.raises(DataError, match="pixel_values"):
        trainer.compute_loss(trainer.model, {**next(iter(trainer.get_train_dataloader())), "pixel_values": torch.ones(1)})


@pytest.mark.parametrize(
    ("found", "fits"), [("0.28.9", False), ("0.29.1", True), ("1.15.0", False), ("1.16.0", True), ("2.0.0", False)]
)
def test_versions(monkeypatch, found, fits):
    monkeypatch.setattr(adapter, "version", lambda name: found)
    monkeypatch.delenv(adapter.ANY_VERSION, raising=False)
    if fits:
        adapter.check_version()
    else:
        with pytest.raises(ConfigError, match=f"trl {found} is installed; supported is"):
            adapter.check_version()


def test_the_package_above_imports_no_trl():
    assert not hasattr(integrations, "DPOTrainer")
