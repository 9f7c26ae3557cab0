"""The consensus game: candidates ranked by where a generator and a discriminator agree.

Axes: n candidate answers to one question, v in (correct, incorrect).
"""

import torch
from torch import Tensor

from alignkit.errors import ConfigError, NumericsError, ShapeError

TOLERANCE = 1e-12  # of the largest change of a probability
MOST_ROUNDS = 100_000


def consensus(generator: Tensor, discriminator: Tensor, *, lam: float) -> tuple[Tensor, Tensor]:
    """The equilibrium of the consensus game: two policies, [2, n] and [n, 2], that rank candidates.

    generator      [2, n]  log P(y | v), v = correct, incorrect; of any normalisation
    discriminator  [n, 2]  log P(v | y); of any normalisation
    lam            how much both hold on to where they begin, above 0

    The policies begin at G1(y | v) ~ P(y | v) / sum_v' P(y | v') and D1(v | y) ~ P(v | y) / sum_y'
    P(v | y'), each normalised, and the equilibrium is G ~ G1 e^(D / (2 lam)), D ~ D1 e^(G / (2 lam)).
    Rank by the first row of G or the first column of D, which are returned as probabilities in
    float64. Above lam = 1/4 there is one equilibrium; below there may be several, and the one that
    the damped iteration from (G1, D1) ends in is returned. (The paper averages regret steps, which
    come to the same points slowly.)

    ShapeError, ConfigError for arguments that do not fit; NumericsError where the iteration does not
    end. Source: Jacob et al. 2023, arXiv:2310.09139.
    """
    if generator.dim() != 2 or len(generator) != 2 or discriminator.shape != generator.T.shape:
        raise ShapeError(
            f"consensus: generator {list(generator.shape)} and discriminator "
            f"{list(discriminator.shape)}; they should be [2, n] and [n, 2]"
        )
    if not lam > 0:
        raise ConfigError(f"consensus: lam is {lam}; it should be above 0")

    wide = generator.double()
    first_g = (wide - wide.logsumexp(0, keepdim=True)).log_softmax(1)
    wide = discriminator.double()
    first_d = (wide - wide.logsumexp(0, keepdim=True)).log_softmax(1)

    # Half a step at a time: a whole one goes back and forth where lam is small.
    policy_g = first_g.exp()
    policy_d = first_d.exp()
    for _ in range(MOST_ROUNDS):
        next_g = (first_g + policy_d.T / (2 * lam)).softmax(1)
        next_d = (first_d + policy_g.T / (2 * lam)).softmax(1)
        change = torch.maximum((next_g - policy_g).abs().max(), (next_d - policy_d).abs().max())
        policy_g = (policy_g + next_g) / 2
        policy_d = (policy_d + next_d) / 2
        if float(change) < TOLERANCE:
            return policy_g, policy_d
    raise NumericsError(
        f"consensus: after {MOST_ROUNDS:,} rounds a probability still changes by {float(change):.1e}"
        "; use a larger lam"
    )
