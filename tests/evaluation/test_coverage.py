"""Coverage of pairs: the mass of the given answers against plain forwards, and samples of the model
itself, whose surprise is its entropy.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from world import run, save_model, write_rows

from alignkit.evaluation.coverage import pair_coverage


def test_the_mass_of_the_answers(tmp_path):
    """Each distinct answer counts once; prompts count alike."""
    save_model(tmp_path / "model")
    rows = [("w5", "w6"), ("w5", "w7"), ("w6", "w8")]
    pairs = [{"prompt": "w10 w4", "chosen": f" {a}", "rejected": f" {b}"} for a, b in rows]
    pairs.append({"prompt": "w9", "chosen": " w5", "rejected": " w6"})
    coverage = pair_coverage(str(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", pairs))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()

    def mass(prompt, words):
        total = 0.0
        for word in words:
            ids = torch.tensor([[*prompt, word, 2]])
            with torch.no_grad():
                laws = model(ids).logits[0].double().softmax(-1)
            total += float(laws[-3, word] * laws[-2, 2])
        return total

    expected = (mass([10, 4], [5, 6, 7, 8]) + mass([9], [5, 6])) / 2
    assert coverage.mass == pytest.approx(expected, rel=1e-5)
    assert coverage.prompts == 2


def test_own_samples_have_the_surprise_of_the_entropy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{3 + i}"} for i in range(20)])
    (tmp_path / "worth.py").write_text(
        "def worth(completions, **_):\n    return [float(sum(map(ord, c)) % 7) for c in completions]\n"
    )
    made = ["pairs", "model", "prompts.jsonl", "--reward", "worth.py:worth", "--to", "own.jsonl"]
    assert run(*made, "--samples", "24", "--per-prompt", "12", "--max-new-tokens", "100") in (
        0,
        None,
    )
    own = pair_coverage("model", "own.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    foreign = [{**row, "chosen": " w3 w3 w3 w3", "rejected": " w4 w4 w4 w4"} for row in rows]
    other = pair_coverage("model", write_rows(tmp_path / "foreign.jsonl", foreign))
    for side in ("chosen", "rejected"):
        # Not exactly: the random model also draws special tokens, which a text does not have.
        gap = own.surprise[side] - own.entropy[side]
        assert abs(gap) < 0.2
        assert other.surprise[side] - other.entropy[side] > abs(gap) + 0.2, other

    capsys.readouterr()
    assert run("data", "check", "own.jsonl", "--coverage", "model") in (0, None)
    assert f"chosen: {own.surprise['chosen']:.3f} nats per token" in capsys.readouterr().out
