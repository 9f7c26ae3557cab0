"""`token_value` on the reviews: the guided law, enumerated, is at least 20 times closer to the tilted
optimum than the base model.
"""

import pytest
import torch
from world import run

from alignkit.evaluation.exact import Listed, listed_reviews
from alignkit.rollout.generate import prompt_ids
from alignkit.runs.learned_value import load_value
from alignkit.runs.trained_model import load_finished
from alignkit.tasks import resolve
from alignkit.tasks.exact import kl


@torch.no_grad()
def fused_logps(networks, tokenizer, prompts, completions):
    """Log-probs of every outcome under the product of several next-token laws, [P, n + 1]."""
    rows = []
    for prompt in prompts:
        start = prompt_ids(prompt, tokenizer)
        ids = torch.cat([start.expand(len(completions), -1), completions], dim=1)
        logits = [n(input_ids=ids).logits[:, len(start) - 1 : -1].double() for n in networks]
        logps = torch.stack(logits).sum(0).log_softmax(-1)
        rows.append(logps.gather(-1, completions[..., None])[..., 0].sum(-1))
    inside = torch.stack(rows)
    outside = torch.log1p(-inside.exp().sum(-1).clamp(max=1 - 1e-12))
    return torch.cat([inside, outside[:, None]], dim=1)


@pytest.mark.long
def test_guidance_comes_close_to_the_optimum(tmp_path):
    assert (
        run("train", "token_value", f"output_dir={tmp_path / 'value'}", "train.eval_every=0") == 0
    )
    world = listed_reviews("reviews")
    listed = Listed(world, resolve("task:reviews").model_folder)
    base = load_finished("task:reviews")
    eos = base.tokenizer.eos_token_id
    completions = torch.tensor(
        [[*base.tokenizer(text)["input_ids"], eos] for text in listed.completions]
    )

    arguments = (base.tokenizer, listed.prompts, completions)
    reference = fused_logps([base.network], *arguments)
    torch.testing.assert_close(reference, listed.reference, rtol=0, atol=1e-3)
    for beta in (0.3, 0.5, 1.0, 2.0):
        value = load_value(str(tmp_path / "value"), beta).network
        guided = fused_logps([base.network, value], *arguments)
        optimum = (listed.reference + listed.rewards / beta).log_softmax(-1)
        distance = float(kl(guided, optimum).mean())
        start = float(kl(listed.reference, optimum).mean())
        print(f"beta {beta}: guided {distance:.4f} nats from the optimum, the base {start:.4f}")
        assert distance < start / 20
