"""The auxiliary loss of mixture-of-experts models, which keeps their routers from sending most tokens
to few experts.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.errors import ModelError
from alignkit.policies.layout import Rows

# Names under which transformers' causal LMs keep the coefficient of their own training loss.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class Router:
    """How a model's routers are balanced (Fedus et al. 2021, arXiv:2101.03961, eqs. 4 to 6)."""

    balance: Callable[..., Any]  # transformers' function for this architecture
    experts: int
    top_k: int
    coefficient: float  # weight in the training loss, more than 0

    def loss(self, router_logits: Any, rows: Rows) -> Tensor:
        """The loss over the tokens of all rows, before the coefficient. Pads do not count."""
        places = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
        tokens = (places < rows.lengths[:, None]).long()
        loss: Tensor = self.balance(router_logits, self.experts, self.top_k, tokens)
        return loss


def router_of(lm: Any, coefficient: float | Literal["auto"]) -> tuple[Router | None, str]:
    """The router of a transformers causal LM, None where there is none or the coefficient is 0, and
    a note for the user. "auto" takes the coefficient of the model's config. ModelError where a
    coefficient is given and transformers has no such loss for the model.
    """
    own = next((value for name in COEFFICIENTS if (value := getattr(lm, name, None))), None)
    balance = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    experts = getattr(lm, "num_experts", None)
    top_k = getattr(lm, "num_experts_per_tok", None)

    if balance is None or not experts or not top_k:
        if coefficient not in ("auto", 0):
            raise ModelError(
                f"train.router_aux_loss is {coefficient}, but transformers has no router loss for "
                f"{type(lm).__name__}; leave it at auto, or set 0"
            )
        named = getattr(lm.config.get_text_config(), "router_aux_loss_coef", 0)
        mixture = getattr(lm.config.get_text_config(), "num_local_experts", 0)
        if coefficient == "auto" and named and mixture:
            return None, f"no router loss: transformers has none for {type(lm).__name__}"
        return None, ""

    weight = float(own or 0.0) if coefficient == "auto" else coefficient
    if not weight:
        return None, ""
    source = "the config's coefficient" if coefficient == "auto" else "train.router_aux_loss"
    return (
        Router(balance, int(experts), int(top_k), weight),
        f"the routers' auxiliary loss is trained on with weight {weight:g} ({source})",
    )
