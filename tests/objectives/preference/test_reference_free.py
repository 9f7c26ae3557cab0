"""GenARM's arm: DPO without a reference, by hand, by its limit, and trained to be fused."""

import torch
from torch.nn.functional import logsigmoid
from world import pair_rows, run, save_model, write_rows

from alignkit import DPO
from alignkit.batches import PairBatch, TokenLogps


def test_it_compares_log_probs_alone():
    arm = DPO(beta=0.5, reference_free=True)
    assert arm.plan.anchors == ()
    mask = torch.ones(2, 3, dtype=torch.bool)
    chosen, rejected = -torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0))
    batch = PairBatch(TokenLogps(chosen, {}, mask), TokenLogps(rejected, {}, mask))
    (term,) = arm.loss(batch).terms
    by_hand = -logsigmoid(0.5 * (chosen.sum(-1) - rejected.sum(-1)))
    torch.testing.assert_close(term.values, by_hand)


def test_the_optimum_needs_no_reference():
    reward = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    arm = DPO(beta=0.5, reference_free=True)
    torch.testing.assert_close(arm.optimum(reward, reference), (reward / 0.5).log_softmax(-1))


def test_an_arm_is_trained_and_fused(tmp_path, capsys):
    base = save_model(tmp_path / "base")
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(6))
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w3 w4"}])
    quiet = ["train.eval_every=0", "train.log_samples_every=0", "train.save_every=0"]
    train = ["train", "dpo", f"model.name_or_path={base}", f"data.train={rows}", *quiet]
    train += ["objective.reference_free=true", "train.steps=3", "train.batch_size=4"]
    assert run(*train, f"output_dir={tmp_path / 'arm'}") == 0

    weights = f"{{policy: 1.0, {tmp_path / 'arm'}: 2.0}}"
    (tmp_path / "genarm.yaml").write_text(
        f"decode: {{model: {base}, method: fuse, weights: {weights}}}"
    )
    request = ["--reference", base, "--prompts", tmp_path / "prompts.jsonl", "--samples", 4]
    request += ["--max-new-tokens", 4, "--to", tmp_path / "eval.json"]
    assert run("eval", tmp_path / "genarm.yaml", *request) == 0
    assert "genarm" in capsys.readouterr().out
