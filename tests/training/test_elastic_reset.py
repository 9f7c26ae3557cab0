"""Elastic Reset against the same arithmetic by hand, and through a resume."""

import torch
from safetensors.torch import load_file
from torch import nn
from world import pair_rows, run, save_model, write_rows

from alignkit.config.train import ResetConfig
from alignkit.training.elastic_reset import ElasticReset


class Numbers:
    """A pair whose policy is one number; its value head must be left alone."""

    def __init__(self):
        self.policy = nn.Parameter(torch.tensor([1.0]))
        self.head = nn.Parameter(torch.tensor([5.0]))

    def state(self):
        return {
            "model.w": self.policy.detach().clone(),
            "value_head.w": self.head.detach().clone(),
        }

    def tensors(self):
        return {"model.w": self.policy.detach(), "value_head.w": self.head.detach()}

    def load_state(self, state):
        with torch.no_grad():
            self.policy.copy_(state["model.w"])
            self.head.copy_(state["value_head.w"])


def test_by_hand():
    """decay 1/2, every 2: m follows 1 -> 2 -> 4, the policy goes back to m, and m to 1."""
    pair = Numbers()
    reset = ElasticReset(pair, ResetConfig(every=2, decay=0.5))
    seen = []
    for step, moved in enumerate((3.0, 6.0, 7.0, 9.0), start=1):
        with torch.no_grad():
            pair.policy.fill_(moved)
            pair.head.fill_(10.0 * moved)
        reset.after_step(step)
        seen.append((pair.policy.item(), float(reset.tensors["average.model.w"])))
    # m: 1 -> 2 -> 4, reset; then 1 -> 4 -> 6.5, reset
    assert seen == [(3.0, 2.0), (4.0, 1.0), (7.0, 4.0), (6.5, 1.0)]
    assert float(pair.head) == 90.0


def test_a_resumed_run_resets_to_the_same_weights(tmp_path):
    base = save_model(tmp_path / "base")
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(8))
    quiet = ["train.eval_every=0", "train.log_samples_every=0", "train.warmup_steps=0"]
    recipe = [
        "train", "dpo", f"model.name_or_path={base}", f"data.train={rows}", "train.batch_size=4",
        "train.learning_rate=1e-2", "train.schedule=constant", "train.save_every=2", *quiet,
    ]  # fmt: skip
    reset = ["train.reset.every=3", "train.reset.decay=0.7"]

    def weights(name, *commands):
        for options in commands:
            assert run(*recipe, f"output_dir={tmp_path / name}", *options) == 0
        return load_file(tmp_path / name / "model" / "model.safetensors")

    whole = weights("whole", [*reset, "train.steps=6"])
    halves = weights(
        "halves", [*reset, "train.steps=4"], [*reset, "train.steps=6", "--resume", "auto"]
    )
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    never = weights("never", ["train.steps=6"])
    assert not all(torch.equal(whole[name], never[name]) for name in whole)
