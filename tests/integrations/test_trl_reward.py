"""The reward model's loss beside TRL's reward trainer: margins and centring."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from world import make_job, pair_rows, save_model, write_rows

from alignkit.batches import ScoredBatch
from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles
from alignkit.objectives.reward.reward_model import PlackettLuce

COEFFICIENT = 0.3
ROWS = [
    {"prompt": row["prompt"], "chosen": f" {row['chosen']}", "rejected": f" {row['rejected']}"}
    for row in pair_rows(6)
]


def trl_loss(folder, rows, out, **options):
    """What TRL's trainer makes of all rows at once."""
    args = RewardConfig(
        str(out), per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, eos_token="</s>", **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = RewardTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    return float(trainer.compute_loss(trainer.model, inputs).detach())


@pytest.mark.parametrize("margins", [None, [0.5, -0.25, 0.0, 1.0, 2.0, 0.125]])
def test_the_loss_is_trls(tmp_path, margins):
    save_model(tmp_path / "lm")
    rows = ROWS
    if margins is not None:
        rows = [{**row, "margin": margin} for row, margin in zip(ROWS, margins)]
    objective = PlackettLuce(centre=4 * COEFFICIENT)
    job = make_job(tmp_path / "lm", tmp_path / "run", objective, [None], accelerator=Accelerator(cpu=True))  # fmt: skip
    job.pair.save(tmp_path / "reward")

    # TRL's rows end with the end token.
    file = write_rows(tmp_path / "rows.jsonl", rows)
    bundles, _ = load_bundles(
        DataConfig(append_eos=True), objective.plan.data, job.pair.tokenizer, source=file
    )
    with torch.no_grad():
        batch = ScoredBatch.build(bundles, job.pair.scores(bundles))
    ours = float(objective.loss(batch).terms[0].values.mean())
    theirs = trl_loss(tmp_path / "reward", rows, tmp_path / "trl", center_rewards_coefficient=COEFFICIENT)  # fmt: skip
    assert ours == pytest.approx(theirs, abs=1e-6)
    plain = objective.loss(ScoredBatch(batch.outputs, batch.sizes)).terms[0].values.mean()
    assert margins is None or abs(float(plain) - ours) > 1e-2
