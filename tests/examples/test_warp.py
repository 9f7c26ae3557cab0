"""WARP in a short form, and a run against a soup (SALSA): what was merged of what, and that the
second round begins where the first ended.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from world import run, save_model, write_rows

from alignkit.policies.merging import linear, slerp

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "warp.py"
RECIPE = """\
model: {name_or_path: model}
data: {train: prompts.jsonl}
objective: {name: rloo, beta: 0.1}
train: {steps: 2, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-2, save_every: 0, log_samples_every: 0}
rollout: {completions: 2, max_new_tokens: 3}
rewards: [{function: "worth.py:worth"}]
"""


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_warp_and_salsa(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(3, 7)])
    Path("worth.py").write_text(
        "def worth(completions, **_):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    Path("mine.yaml").write_text(RECIPE)
    monkeypatch.setattr(
        sys, "argv", [str(EXAMPLE), "mine.yaml", "warp", "--share", "0.5", "train.steps=1"]
    )
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "merged: warp/1/merged warp/2/merged" in capsys.readouterr().out

    start = weights("model")
    for k, begin in ((1, "model"), (2, "warp/1/merged")):
        start = weights(begin)
        runs = [weights(f"warp/{k}/{seed}/model") for seed in (0, 1)]
        merged = weights(f"warp/{k}/merged")
        moved = False
        for name, value in start.items():
            arc = slerp(value, runs[0][name], runs[1][name], 0.5)
            torch.testing.assert_close(merged[name], linear(value, [arc], [1.0], 0.5))
            moved |= not torch.equal(merged[name], value)
        assert moved
        record = json.loads(Path(f"warp/{k}/merged/merge.json").read_text())
        assert (record["method"], record["share"]) == ("slerp", 0.5)

    # Against the soup of the first round: the KL to it is not 0 from the first step on.
    assert run("train", "mine.yaml", "reference.kind=warp/1/merged", "output_dir=salsa") == 0
    first = json.loads(Path("salsa/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl/behavior_reference_k1"]) > 0
