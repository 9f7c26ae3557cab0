"""Merging of models that started from the same weights, tensor by tensor.

The task vector of a model is what training added: d = model - start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.tensors import check_same_shape

PARALLEL = 1e-6  # sine of the angle below which two task vectors count as parallel


def linear(
    start: Tensor, models: Sequence[Tensor], weights: Sequence[float], share: float
) -> Tensor:
    """start + share * sum of weight * (model - start), in the shape and dtype of `start`.

    The weights are used as they are given, without a division by their sum. `share` between 0 and 1
    goes towards the start (LITI), above 1 beyond the models. Computed in float32 or wider; tensors
    of whole numbers (buffers) must be equal in all models. ShapeError where shapes differ,
    ConfigError where there are not as many weights as models. Source: Rame et al. 2024,
    arXiv:2406.16768, eq. 5.
    """
    if len(models) != len(weights) or not models:
        raise ConfigError(
            f"merge: {len(models)} models and {len(weights)} weights; give one weight per model"
        )
    for model in models:
        check_same_shape(start=start, model=model)
    if not start.is_floating_point():
        return _equal_buffer(start, models)

    wide = _wide(start)
    step = torch.zeros_like(wide)
    for model, weight in zip(models, weights, strict=True):
        step = step + weight * (model.to(wide.dtype) - wide)
    return (wide + share * step).to(start.dtype)


def slerp(start: Tensor, first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two task vectors, added to the start; share 0 is `first`.

    A tensor of any shape is one vector. With the angle O between d_1 and d_2 the result is
    start + sin((1 - share) O) / sin O d_1 + sin(share O) / sin O d_2; linear where one of them is 0
    or they are parallel. Orthogonal task vectors of equal norm keep their norm, which linear
    interpolation shortens. Computed in float32 or wider, returned in the dtype of `start`.

    ShapeError where shapes differ; ConfigError for opposite task vectors, between which no shortest
    arc exists. Source: Rame et al. 2024, arXiv:2406.16768, eq. 4.
    """
    check_same_shape(start=start, first=first, second=second)
    if not start.is_floating_point():
        return _equal_buffer(start, [first, second])

    wide = _wide(start)
    one = first.to(wide.dtype) - wide
    two = second.to(wide.dtype) - wide

    # The angle decides between two formulas, so it is computed in float64.
    norms = one.double().norm() * two.double().norm()
    if float(norms) == 0:
        return (wide + (1 - share) * one + share * two).to(start.dtype)
    cosine = ((one.double() * two.double()).sum() / norms).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    if float(sine) < PARALLEL and float(cosine) < 0:
        raise ConfigError(
            "merge: two task vectors point in opposite directions, and slerp has no shortest way "
            "between them; use the linear method"
        )
    if float(sine) < PARALLEL:
        return (wide + (1 - share) * one + share * two).to(start.dtype)

    first_weight = (torch.sin((1 - share) * angle) / sine).to(wide.dtype)
    second_weight = (torch.sin(share * angle) / sine).to(wide.dtype)
    return (wide + first_weight * one + second_weight * two).to(start.dtype)


def _equal_buffer(start: Tensor, models: Sequence[Tensor]) -> Tensor:
    """A tensor of whole numbers, which cannot be interpolated: the same in every model."""
    if any(not torch.equal(start, model) for model in models):
        raise ConfigError("merge: a tensor of whole numbers differs between the models")
    return start.clone()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
