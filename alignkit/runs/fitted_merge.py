"""Weights of a merge that keep it as close as can be to each model on that model's own prompts.

DivMerge (Touayouch et al. 2025, arXiv:2509.02108) with one weight per model. No answers are needed:
what is compared are the laws of the first token of an answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.config.data import DataConfig
from alignkit.data.load import load_prompts
from alignkit.errors import DataError, ModelError
from alignkit.objectives.vocabulary_divergences import distillation_loss

STEPS = 60  # most iterations of the search

# Log-probs of the merge with these weights [M], chunk by chunk: the model's number, [n, V], and the
# model's own log-probs [n, V].
Laws = Callable[[Tensor], Iterator[tuple[int, Tensor, Tensor]]]


@dataclass(frozen=True)
class WeightFit:
    """The weights that were found, and the divergence before and after, summed over the models."""

    weights: list[float]
    equal: float  # nats, with the equal weights that the search begins with
    fitted: float  # nats


def fit_weights(laws: Laws, counts: Sequence[int]) -> WeightFit:
    """The weights that minimise the sum over models of the mean Jensen-Shannon divergence between
    the merge's law and the model's, over the model's `counts` prompts each.

    By L-BFGS from equal weights: a minimum near those, which is the least of all where the
    divergence has one minimum. ModelError where it stops being finite.
    """
    start = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weights],
        max_iter=STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        search.zero_grad()
        total = 0.0
        for number, merged, own in laws(weights):
            part = distillation_loss(merged, own, divergence="jsd").sum() / counts[number]
            part.backward()  # chunk by chunk, so that one chunk's graph is held
            total += float(part.detach())
        if not math.isfinite(total):
            raise ModelError("merge: --fit: the laws of the merged model are not finite")
        return total

    with torch.enable_grad():
        equal = closure()
        search.step(closure)
        fitted = closure()
    return WeightFit(weights.detach().tolist(), equal, fitted)


def model_laws(
    network: Any,
    start: dict[str, Tensor],
    models: Sequence[dict[str, Tensor]],
    prompts: Sequence[Sequence[Tensor]],
) -> Laws:
    """`fit_weights`'s laws for models on disk: the tensors of the start and of the models, and each
    model's prompts as token ids. One prompt is read at a time.
    """
    moved = [name for name, value in start.items() if any((value != m[name]).any() for m in models)]
    vectors = [{name: model[name] - start[name] for name in moved} for model in models]

    def law(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Log-probs [1, V] of the token after a prompt."""
        rows = ids.unsqueeze(0).to(next(iter(start.values())).device)
        output = torch.func.functional_call(network, tensors, (), {"input_ids": rows})
        return output.logits[:, -1].float().log_softmax(-1)

    with torch.no_grad():
        own = [[law(model, ids) for ids in given] for model, given in zip(models, prompts)]

    def laws(weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for number, given in enumerate(prompts):
            for ids, target in zip(given, own[number]):
                merged = dict(start)
                for name in moved:
                    steps = (w.to(v[name]) * v[name] for w, v in zip(weights, vectors))
                    merged[name] = start[name] + sum(steps)
                yield number, law(merged, ids), target

    return laws


def read_prompts(sources: Sequence[str], models: int, tokenizer: Any) -> list[list[Tensor]]:
    """The prompts of each model as token ids; one source serves them all. DataError for one without
    prompts.
    """
    lists = []
    for source in sources:
        prompts, _ = load_prompts(DataConfig(), tokenizer, source=source)
        if not prompts:
            raise DataError(f"merge: --fit {source} has no prompts; give rows with `prompt`")
        lists.append([prompt.ids for prompt in prompts])
    return lists * models if len(lists) == 1 else lists
