"""alignkit's own loop on the batches of TRL's trainers: what the tests of both share."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from trl_world import letters

from alignkit.batches import Bundle, RolloutBatch
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.policies.load import load_pair
from alignkit.training.reduction import Reducer


def native(model, objective, *, temperature=1.0):
    """alignkit's policy pair with a frozen reference, and its reducer."""
    config, accelerator = ModelConfig(name_or_path=str(model)), Accelerator(cpu=True)
    pair = load_pair(
        config,
        ReferenceConfig(kind="frozen"),
        None,
        objective.plan,
        device="cpu",
        fixed_data=True,
        temperature=temperature,
    )
    pair.prepare(accelerator, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    return pair, Reducer(objective, pair, accelerator, 4096)


def move(*modules, by=0.05):
    """Away from the reference, all in the same direction, so that every part of a loss counts."""
    for module in modules:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


class Caught(Exception):
    """Carries a rollout out of `train`."""


def rollout(trainer):
    """The first rollout that TRL samples, scores and collates."""

    def catch(model, inputs, **_):
        raise Caught(inputs)

    own, trainer.compute_loss = trainer.compute_loss, catch
    with pytest.raises(Caught) as caught:
        trainer.train()
    trainer.compute_loss, trainer.current_gradient_accumulation_steps = own, 1
    return caught.value.args[0]


def grouped(trainer, inputs):
    """TRL's rows as bundles with their scores, and the rows' order in them."""
    prompts = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"])
    ]
    bundles, order = [], []
    for prompt in sorted(set(prompts)):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        order += rows
        completions = [
            inputs["completion_ids"][i][inputs["completion_mask"][i].bool()] for i in rows
        ]
        texts = trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
        masks = [torch.ones(len(c), dtype=torch.bool) for c in completions]
        bundles.append(
            Bundle(
                torch.tensor(prompt),
                completions,
                masks,
                rows={"score": torch.tensor(letters(texts))},
            )
        )
    return bundles, torch.tensor(order)


def credited(objective, bundles, tokens, behavior):
    """The bundles with behaviour log-probs and the objective's own advantages, as alignkit's loop
    fills them in.
    """
    scores = torch.cat([b.rows["score"] for b in bundles])
    groups = torch.tensor([i for i, b in enumerate(bundles) for _ in b.completions])
    filled, _ = objective.credit(
        RolloutBatch(replace(tokens, behavior=behavior), scores, groups), {}
    )
    result, at = [], 0
    for bundle in bundles:
        lengths = [len(c) for c in bundle.completions]
        channels = {"behavior": behavior, "advantages": filled.advantages, **tokens.anchors}
        rows = {
            name: [values[at + k, :n] for k, n in enumerate(lengths)]
            for name, values in channels.items()
        }
        result.append(replace(bundle, tokens=rows))
        at += len(lengths)
    return result


def row_bundle(ids, mask, real, *rows, **columns):
    """The bundle of one prompt from `rows` of a collated batch [N, L]: its completions begin where
    the mask of the first does.
    """
    start = int(mask[rows[0]].float().argmax())
    sides = [(ids[r][real[r]][start:], mask[r][real[r]][start:]) for r in rows]
    return Bundle(ids[rows[0], :start], [s[0] for s in sides], [s[1] for s in sides], rows=columns)


def pair_bundles(inputs):
    """The bundles of a batch of TRL's preference collator."""
    ids, mask = inputs["input_ids"], inputs["completion_mask"].bool()
    real = inputs["attention_mask"].bool()
    half = len(ids) // 2
    return [row_bundle(ids, mask, real, c, c + half) for c in range(half)]
