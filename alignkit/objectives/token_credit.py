"""Token values from how strongly a token is associated with correct completions."""

import math

import torch
from torch import Tensor

from alignkit.errors import ConfigError, ShapeError
from alignkit.tensors import check_same_shape

SATURATION = 2.0  # k1 of the term frequency
SMALL = 1e-5  # keeps ratios of term frequencies finite, as published


@torch.no_grad()
def ktae_values(
    ids: Tensor, mask: Tensor, correct: Tensor, groups: Tensor, *, length_prior: float = 0.0
) -> Tensor:
    """Value of every own token in [-1, 1]: [N, T] int64, [N, T] bool, [N] bool, [N] int64 -> [N, T].

    Per token id of a group, the completions that contain it are counted among the correct ones (a)
    and the wrong ones (b), with c and d those that do not. The value joins Fisher's exact test and
    the information gain of that table with Cohen's h and the ratio of the two sides' term
    frequencies; an id has the same value wherever it stands in its group. Groups in which one side
    is empty have value 0. Computed in float64, without a gradient; 0 outside the mask.

    `length_prior` is b' of the term frequency's length norm. 0 (the default) leaves it out; the
    paper's 0.5 gives tokens of the longer side the wrong sign. ConfigError outside [0, 1]; ShapeError
    for shapes that do not fit. Source: Sun et al. 2025, arXiv:2505.16826, eqs. 3 to 9.
    """
    check_same_shape(ids=ids, mask=mask)
    check_same_shape(correct=correct, groups=groups)
    if ids.dim() != 2 or groups.shape != ids.shape[:1]:
        raise ShapeError(
            f"ids has the shape {list(ids.shape)} and groups {list(groups.shape)}; they should be "
            "[N, T] and [N]"
        )
    if not 0 <= length_prior <= 1:
        raise ConfigError(f"length_prior is {length_prior}; it should be between 0 and 1")
    values = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    if not bool(mask.any()):
        return values

    # One entry per own token; `word` numbers the pairs of a group and a token id.
    _, group = groups.unique(return_inverse=True)
    row = torch.arange(len(ids), device=ids.device).unsqueeze(-1).expand_as(ids)[mask]
    right = correct.bool()[row]
    words, word = torch.stack([group[row], ids[mask]], dim=1).unique(dim=0, return_inverse=True)
    group_of_word = words[:, 0]

    # Completions and tokens of each side, per group.
    n_groups = int(group.max()) + 1
    completions = _two_sided(group, correct.bool(), n_groups)
    tokens = _two_sided(group[row], right, n_groups)

    # Completions that contain the word (each once), and its occurrences, per side.
    pairs = torch.stack([word, row], dim=1).unique(dim=0)
    contain = _two_sided(pairs[:, 0], correct.bool()[pairs[:, 1]], len(words))
    occurrences = _two_sided(word, right, len(words))

    totals = tokens[group_of_word]
    association = _association(contain, completions[group_of_word])
    frequency = _term_frequency(occurrences, totals, length_prior)
    ratio = frequency[:, 0] / (frequency[:, 1] + SMALL) - frequency[:, 1] / (
        frequency[:, 0] + SMALL
    )
    shares = contain / completions[group_of_word].clamp(min=1)
    angles = torch.asin(shares.sqrt())
    effect = angles[:, 0] - angles[:, 1]

    z = association / 2 * (effect + ratio)
    both_sides = (completions[group_of_word] > 0).all(-1) & (totals > 0).all(-1)
    value = torch.where(both_sides, torch.tanh(z / 2), 0.0)  # 2 sigmoid(z) - 1
    values[mask] = value[word]
    return values


def _two_sided(index: Tensor, right: Tensor, n: int) -> Tensor:
    """Counts per entry of `index` on the correct and on the wrong side: [n, 2] float64."""
    counts = torch.zeros(n, 2, dtype=torch.float64, device=index.device)
    side = torch.where(right, 0, 1)
    return counts.index_put_((index, side), counts.new_ones(len(index)), accumulate=True)


def _association(contain: Tensor, completions: Tensor) -> Tensor:
    """exp(-2 p) of Fisher's two-sided test (0 where p is 1) plus the information gain in bits."""
    p = _fisher(contain, completions)
    strength = torch.where(p > 1 - 1e-9, 0.0, torch.exp(-2 * p))
    total = completions.sum(-1)
    inside = contain.sum(-1)
    conditional = (
        inside * _entropy(contain) + (total - inside) * _entropy(completions - contain)
    ) / total.clamp(min=1)
    return strength + (_entropy(completions) - conditional).clamp(min=0)


def _fisher(contain: Tensor, completions: Tensor) -> Tensor:
    """Two-sided p of the tables [[a, b], [c, d]]: the mass of all tables at most as likely."""
    inside = contain.sum(-1, keepdim=True)
    right = completions[:, :1]
    wrong = completions[:, 1:]
    a = torch.arange(int(right.max()) + 1, dtype=torch.float64, device=contain.device)

    # The hypergeometric law of a, given the margins: [words, largest a + 1].
    possible = (a <= right) & (a <= inside) & (inside - a <= wrong)
    log_law = _log_choose(right, a) + _log_choose(wrong, inside - a)
    log_law = log_law - _log_choose(right + wrong, inside)
    law = torch.where(possible, log_law.exp(), 0.0)

    observed = law.gather(1, contain[:, :1].long())
    at_most = law <= observed * (1 + 1e-7)
    return torch.where(at_most, law, 0.0).sum(-1).clamp(max=1.0)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of the binomial coefficient; its value where k is out of range is not used."""
    k = torch.minimum(k.clamp(min=0), n)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of the two sides' shares, [n]; 0 where nothing was counted."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(shares, shares).sum(-1) / math.log(2)


def _term_frequency(occurrences: Tensor, tokens: Tensor, length_prior: float) -> Tensor:
    """Saturated share of a side's tokens that are this word, [n, 2]."""
    share = occurrences / tokens.clamp(min=1)
    relative_length = tokens / tokens.mean(-1, keepdim=True).clamp(min=1)
    norm = 1 - length_prior + length_prior * relative_length
    return share * (SATURATION + 1) / (share + SATURATION * norm)
