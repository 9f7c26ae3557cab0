"""What does not fit into TRL's trainers is refused with one sentence that says what to do."""

import importlib
import sys
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from pydantic import PositiveFloat
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOTrainer
from trl_world import COMMON, PAIRS, curve, dpo_trainer, grpo_trainer

from alignkit import integrations
from alignkit.batches import LossTerms, PairBatch
from alignkit.errors import ConfigError, DataError
from alignkit.integrations import trl_checks as checks
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.base import PairObjective, Weighted
from alignkit.objectives.online.dapo import DAPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.rloo import RLOO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.preference.aot import AOT
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.ipo import IPO
from alignkit.objectives.preference.kto import KTO
from alignkit.objectives.preference.radpo import RaDPO
from alignkit.objectives.preference.sft import SFT
from alignkit.objectives.preference.simpo import SimPO
from alignkit.objectives.self_play.nash_md import NashMD


class UnslothDPOTrainer(DPOTrainer):
    """What `import unsloth` leaves in trl's place."""


class Mine(UnslothDPOTrainer):
    """A user's subclass of it."""


@dataclass
class OnCpu(DPOConfig):
    """Arguments that work without a GPU as they come."""

    use_cpu: bool = True
    bf16: bool = False


class ByToken(PairObjective):
    """Reads the reference token by token."""

    beta: PositiveFloat = 0.1

    def loss(self, batch: PairBatch) -> LossTerms:
        return batch.rows(
            "by_token", (batch.rejected.log_ratio - batch.chosen.log_ratio).exp().sum(-1)
        )


@pytest.mark.parametrize(
    ("objective", "base", "message"),
    [
        (
            KTO(),
            DPOTrainer,
            "KTO learns from labelled data, which DPOTrainer does not have; .*alignkit's own loop",
        ),
        (NashMD(), GRPOTrainer, "NashMD learns from game data.*alignkit's own loop"),
        (
            GRPO(),
            DPOTrainer,
            "GRPO learns from rollout data, which DPOTrainer does not have; use base=GRPOTrainer",
        ),
        (DPO(), GRPOTrainer, "DPO learns from pair data, .*use base=DPOTrainer"),
        (SFT(), GRPOTrainer, "use base=DPOTrainer"),
        (
            KLPPO(),
            GRPOTrainer,
            "KLPPO needs a value head.*, which GRPOTrainer cannot give; use `alignkit train`",
        ),
        (
            GRPO(epochs=2),
            GRPOTrainer,
            "needs epochs or minibatches of its own .in TRL: args.num_iterations",
        ),
        (
            RPG(),
            GRPOTrainer,
            "RPG's advantages depend on more.*the KL to the reference.*; set kl_credit='token', or use `alignkit",
        ),
        (
            RLOO(),
            GRPOTrainer,
            "RLOO's advantages depend on more than the rewards.*TRL's do not; use `alignkit train`",
        ),
        (DAPO(), GRPOTrainer, "set drop_constant=False, or use `alignkit train`"),
        (
            RPG(anchor="behavior", baseline="none"),
            GRPOTrainer,
            "are not rewards minus their group's mean.*baseline='leave_one_out'",
        ),
        (DPO, DPOTrainer, "objective is DPO, not an objective's instance; give one, such as DPO"),
        ("dpo", DPOTrainer, "objective is str, not an objective's instance"),
        (
            DPO(),
            dict,
            "base is dict; allowed are DPOTrainer, GRPOTrainer, DistillationTrainer and their",
        ),
        (DPO(), "DPOTrainer", "base is 'DPOTrainer', not a class"),
        (
            DPO(),
            UnslothDPOTrainer,
            "UnslothDPOTrainer is patched by unsloth.*run without `import unsloth`",
        ),
        (DPO(), Mine, "Mine is patched by unsloth"),
    ],
)
def test_what_does_not_fit(objective, base, message):
    with pytest.raises(ConfigError, match=message) as caught:
        as_trl_trainer(objective, base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (
            DPO(beta=0.2),
            {"beta": 0.3},
            r"args\.beta is 0\.3, DPO's is 0\.2; leave it out of the arguments, the objective decides",
        ),
        (IPO(tau=0.2), {"beta": 0.3}, r"args\.beta is 0\.3, IPO has none"),
        (
            DPO(),
            {"loss_type": "ipo"},
            r"loss_type=\['ipo'\] would change nothing, the loss is DPO's",
        ),
        (
            DPO(),
            {"label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
            "label_smoothing=0.1, f_divergence_type='js_div",
        ),
        (DPO(), {"ld_alpha": 0.5}, "ld_alpha=0.5 would change nothing"),
        (
            RaDPO(),
            {"precompute": True},
            "precompute_ref_log_probs=True keeps one sum per completion.*set it to False",
        ),
        (ByToken(), {"precompute": True}, "reads the reference token by token; set it to False"),
        (
            AOT(),
            {"accumulation": 2},
            "AOT compares all pairs of an optimiser step .*gradient_accumulation_steps=1",
        ),
    ],
)
def test_arguments_of_preference_training(model, tmp_path, objective, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        dpo_trainer(as_trl_trainer(objective), model, tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (GRPO(beta=0.1), {"beta": 0.2}, r"args\.beta is 0\.2, GRPO's is 0\.1"),
        (
            GRPO(beta=0),
            {"epsilon": 0.1, "loss_type": "dr_grpo"},
            "epsilon=0.1, loss_type='dr_grpo' would change nothing",
        ),
        (GRPO(beta=0), {"delta": 3.0}, "delta=3.0 would change nothing"),
        (
            GRPO(beta=0),
            {"use_vllm": True},
            "vllm_importance_sampling_correction=True weighs TRL's own loss; set it to False",
        ),
        (
            GRPO(beta=0),
            {"scale_rewards": "none"},
            "scale_rewards is 'none', GRPO's advantages are those of 'group'; leave it out",
        ),
        (GRPO(beta=0), {"scale_rewards": "batch"}, "scale_rewards is 'batch'"),
        (
            GRPO(beta=0),
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' makes other advantages than GRPO's.*"
            "leave it out, or use TRL's own trainer",
        ),
    ],
)
def test_arguments_of_online_training(model, tmp_path, objective, settings, message):
    with pytest.raises(ConfigError, match=message):
        grpo_trainer(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, **settings)


def test_one_beta_one_scaling_and_other_wrong_arguments(model, tmp_path):
    trainer = dpo_trainer(as_trl_trainer(DPO(beta=0.2)), model, tmp_path)
    # the objective's, though TRL's default was in the arguments
    assert trainer.args.beta == trainer.beta == 0.2
    # it reads no reference
    assert dpo_trainer(as_trl_trainer(SimPO(beta=2.0)), model, tmp_path, beta=2.0).args.beta == 0
    raw = RPG(anchor="behavior", beta=0.01)
    online = grpo_trainer(as_trl_trainer(raw, GRPOTrainer), model, tmp_path, num_generations_eval=2)
    assert (online.args.scale_rewards, online.beta, online.ref_model) == ("none", 0, None)
    # the others' mean as baseline
    assert online._factor == pytest.approx({"train": 4 / 3, "eval": 2})
    cls = as_trl_trainer(DPO())
    with pytest.raises(ConfigError, match="args is a TrainingArguments; give a DPOConfig"):
        cls(str(model), args=TrainingArguments(str(tmp_path)))
    arguments = DPOConfig(str(tmp_path), **{**COMMON, "use_liger_kernel": True})
    with pytest.raises(ConfigError, match="use_liger_kernel=True replaces the model's forward"):
        cls(str(model), args=arguments)
    with pytest.raises(ConfigError, match="call compute_loss with return_outputs=False"):
        online.compute_loss(online.model, {}, return_outputs=True)


def test_batches_that_lack_or_hold_too_much(model, tmp_path):
    trainer = dpo_trainer(as_trl_trainer(DPO()), model, tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(
        DataError,
        match="holds pixel_values, which this adapter does not read; it trains on text alone",
    ):
        trainer.compute_loss(trainer.model, {**inputs, "pixel_values": torch.ones(1)})
    # as with precompute_ref_log_probs and a collator that forgets its columns
    trainer.ref_model = None
    with pytest.raises(
        ConfigError,
        match="DPO needs a reference, but TRL holds no reference model and this batch brings no",
    ):
        trainer.compute_loss(trainer.model, inputs)
    online = grpo_trainer(as_trl_trainer(GRPO(beta=0.1), GRPOTrainer), model, tmp_path, beta=0.1)
    ones = torch.ones(2, 3, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": ones,
        "completion_mask": ones,
        "advantages": torch.ones(2),
    }
    with pytest.raises(ConfigError, match="GRPO needs a reference"):
        online.compute_loss(online.model, inputs)


def test_arguments_by_position_or_left_out(model, tmp_path, monkeypatch):
    """A script's call stays as it is: (model, reward, args) by position, or no args at all."""
    monkeypatch.chdir(tmp_path)
    trainer = grpo_trainer(as_trl_trainer(GRPO(beta=0.1), GRPOTrainer), model, tmp_path, beta=0.1)
    again = type(trainer)(str(model), trainer.reward_funcs[0], trainer.args, trainer.train_dataset)
    assert again.args.beta == 0.1
    cls = as_trl_trainer(DPO(beta=0.3))
    monkeypatch.setattr(cls, "config", OnCpu)  # TRL's own defaults want a GPU
    bare = cls(str(model), train_dataset=Dataset.from_list(PAIRS))
    assert (bare.args.beta, bare.args.output_dir) == (0.3, f"{model.name}-DPO")


@pytest.mark.parametrize(
    ("objective", "warned"),
    [
        (IPO(), True),
        (IPO(form="mean"), False),
        (Weighted(parts=[(IPO(), 1.0), (SFT(), 0.1)]), True),
        (DPO(), False),
    ],
)
def test_the_other_form_of_ipo_is_announced(recwarn, objective, warned):
    as_trl_trainer(objective)
    messages = [str(w.message) for w in recwarn if "loss_type='ipo'" in str(w.message)]
    assert len(messages) == warned
    assert all("form='mean'" in message for message in messages)


def test_a_weighted_list_its_metrics_and_the_model_card(model, tmp_path):
    objective = Weighted(parts=[(DPO(beta=0.1), 1.0), (SFT(), 0.1)])
    trainer = dpo_trainer(as_trl_trainer(objective), model, tmp_path)
    assert curve(trainer).isfinite().all()
    assert {"rewards/chosen", "rewards/margins", "nll"} <= trainer.state.log_history[0].keys()
    assert as_trl_trainer(RaDPO()).__name__ == "RaDPODPOTrainer"
    trainer = dpo_trainer(as_trl_trainer(RaDPO()), model, tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "trained with RaDPO, a method introduced in" in card
    assert "huggingface.co/papers/2505.20359" in card


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("0.28.9", False),
        ("0.29.1", True),
        ("1.15.0", False),
        ("1.16.0", True),
        ("1.17.0.dev0", True),
        ("2.0.0", False),
    ],
)
def test_releases(monkeypatch, found, fits):
    monkeypatch.setattr(checks, "version", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(checks.ANY_VERSION, raising=False)
    if fits:
        checks.check_version()
        return
    with pytest.raises(
        ConfigError,
        match=f"trl {found} is installed; supported is trl>=0.29.1,<2, not 1.15.0 on a machine",
    ):
        checks.check_version()
    monkeypatch.setenv(checks.ANY_VERSION, "1")
    checks.check_version()


def test_no_release_at_all(monkeypatch):
    def absent(name):
        raise checks.PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", absent)
    with pytest.raises(ConfigError, match=r"trl is not installed; install one of trl>=0\.29\.1,<2"):
        checks.check_version()


def test_an_unknown_release_is_refused_before_it_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "alignkit.integrations.trl")
    monkeypatch.setattr(checks, "version", lambda name: "0.28.0")
    with pytest.raises(ConfigError, match=r"trl 0\.28\.0 is installed"):
        importlib.import_module("alignkit.integrations.trl")


def test_a_gpu_makes_1_15_0_fit(monkeypatch):
    monkeypatch.setattr(checks, "version", lambda name: "1.15.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    checks.check_version()


def test_the_package_above_imports_no_trl():
    assert not hasattr(integrations, "DPOTrainer")
