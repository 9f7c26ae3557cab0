"""Rules of sampling whose cut follows the law itself: the sparse law that is nearest at a price per
token, and a cut that steers the surprise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import ConfigError


def bregman_top_k(logprobs: Tensor, cost: float, order: int) -> Tensor:
    """The law q that minimises D(q, p) + cost * (tokens that q keeps), as log-probs: [R, V] -> [R, V].

    `order` 1 is the KL of q to p: the k likeliest, renormalised. `order` 2 is half the squared
    distance: what they lack to 1 is shared out equally. Both keep the k likeliest for some k, and all
    k are tried. Noarov et al. 2025, arXiv:2505.19371. ConfigError for another order or a negative cost.
    """
    if order not in (1, 2) or cost < 0:
        raise ConfigError(f"sampling: cost {cost} (at least 0) and order {order} (1 or 2)")
    wide = logprobs.double()
    ordered, index = wide.sort(dim=-1, descending=True)
    probs = ordered.exp()
    mass = probs.cumsum(-1).clamp(max=1)
    count = torch.arange(1, probs.shape[-1] + 1, device=probs.device)

    # What keeping the k likeliest costs, for every k at once.
    if order == 1:
        distance = -mass.log()
    else:
        left_out = (probs**2).sum(-1, keepdim=True) - (probs**2).cumsum(-1)
        distance = ((1 - mass) ** 2 / count + left_out) / 2
    best = (distance + cost * count).argmin(-1, keepdim=True)  # [R, 1], k - 1

    sparse = ordered
    if order == 2:
        lack = (1 - mass.gather(-1, best)) / (best + 1)
        sparse = (probs + lack).log()
    sparse = sparse.masked_fill(count > best + 1, -torch.inf).log_softmax(-1)
    return torch.empty_like(sparse).scatter(-1, index, sparse).to(logprobs.dtype)


@dataclass(frozen=True)
class Mirostat:
    """Leaves out tokens of more surprise than a bar, and moves each row's bar so that what is drawn
    has a surprise of `target` nats in the mean (Basu et al. 2021, arXiv:2007.14966, version 2).

    The bar begins at twice the target. After T tokens the mean surprise is the target plus (first bar -
    last bar) / (rate T), whatever the laws are.
    """

    target: float  # nats per token
    rate: float = 0.1

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.rate > 0):
            raise ConfigError(
                f"sampling: surprise {self.target} and its rate {self.rate} must be above 0"
            )

    def first(self, rows: int, device: torch.device) -> Tensor:
        """The bars [R] of new rows."""
        return torch.full((rows,), 2 * self.target, device=device)

    def cut(self, logits: Tensor, bars: Tensor) -> Tensor:
        """Logits [R, V] without the tokens above the bar; the likeliest always stays."""
        logprobs = logits.float().log_softmax(-1)
        outside = -logprobs > bars[:, None]
        outside.scatter_(-1, logprobs.argmax(-1, keepdim=True), False)
        return logits.masked_fill(outside, -torch.inf)

    def moved(self, bars: Tensor, logps: Tensor) -> Tensor:
        """The bars after tokens with these log-probs under the law they were drawn from: [R]."""
        return bars - self.rate * (-logps.float() - self.target)
