"""SMC steering's choice of particles: without replacement, so that none is kept twice."""

import torch
from torch import Tensor

from alignkit.decoding.particles import check_alive
from alignkit.errors import ConfigError, ShapeError


def steering_step(log_weights: Tensor, uniform: float, *, keep: int) -> tuple[Tensor, Tensor]:
    """Keep `keep` of M weighted particles, no two of them the same one, without bias.

    With c such that sum min(1, c w_i) = keep, a particle of w_i >= 1 / c stays as it is; of the
    others particle i stays with probability c w_i, drawn systematically by one `uniform` in [0, 1),
    and then weighs 1 / c. So for any function the sum of new weight times function has the old sum
    as its expectation, and log mean of all weights is carried by the weights themselves.

    log_weights [M] float64, -inf for a dead particle -> places of those that are kept [keep] int64,
    in their order, and their log-weights [keep]. Where no more than `keep` are alive, all of these
    stay, and fewer are returned.

    ShapeError, ConfigError for arguments that do not fit; NumericsError where all are dead or a
    weight is not a number. Source: Lew et al. 2023, arXiv:2306.03081; the scheme is
    Fearnhead and Clifford 2003.
    """
    if log_weights.dim() != 1 or not len(log_weights):
        raise ShapeError(f"log_weights has the shape {list(log_weights.shape)}; it should be [M]")
    if keep < 1:
        raise ConfigError(f"keep is {keep}; it should be at least 1")
    if not 0 <= uniform < 1:
        raise ConfigError(f"uniform is {uniform}; it should be in [0, 1)")
    check_alive(log_weights[None])

    logs = log_weights.double()
    alive = (logs > -torch.inf).nonzero()[:, 0]
    if len(alive) <= keep:
        return alive, logs[alive]

    log_c = _log_c(logs, keep)
    chances = (logs + log_c).exp().clamp(max=1.0)
    certain = chances >= 1.0

    # Systematic over the others: their chances sum to a whole number of places.
    places = keep - int(certain.sum())
    sums = torch.where(certain, 0.0, chances).cumsum(0)
    points = (uniform + torch.arange(places, dtype=torch.float64)) * (sums[-1] / max(places, 1))
    chosen = torch.searchsorted(sums, points, right=True)

    stays = certain.clone()
    stays[chosen] = True
    new = torch.where(certain, logs, -log_c)
    kept_places = stays.nonzero()[:, 0]
    return kept_places, new[kept_places]


def _log_c(logs: Tensor, keep: int) -> float:
    """log c with sum min(1, c w_i) = keep, for more than `keep` weights above 0.

    Where the m largest are cut at 1, c = (keep - m) / (sum of the others), for the smallest m at
    which no other one is above 1 / c.
    """
    ordered = logs.sort(descending=True).values
    for cut in range(keep):
        log_c = float(torch.tensor(float(keep - cut)).log() - ordered[cut:].logsumexp(0))
        if float(ordered[cut]) + log_c < 0:
            return log_c
    raise AssertionError("unreachable: at keep - 1 cuts no weight is above the sum of the others")
