"""A copy of the policy that samples while the policy itself is trained (`rollout.ahead`)."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.policies.pair import PolicyPair


class PolicyCopy:
    """The policy as it was some steps ago, in the place of `Models`: no other model can be drawn
    from. It takes as much memory as the policy.
    """

    def __init__(self, pair: PolicyPair):
        self.pair = pair
        self.tokenizer = pair.tokenizer
        device = pair.device.type
        with pair.model("policy") as model:
            # Autocast belongs to a thread, and the copy samples in another one.
            self._precision = (
                device,
                torch.get_autocast_dtype(device),
                torch.is_autocast_enabled(device),
            )
            self.network = copy.deepcopy(model).requires_grad_(False).eval()

    def take(self) -> dict[str, Tensor]:
        """The weights that training changes, as they are now."""
        with self.pair.model("policy") as model:
            return {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }

    @torch.no_grad()
    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Draw with these weights from here on."""
        for name, parameter in self.network.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])

    @contextmanager
    def model(self, name: str = "policy") -> Iterator[nn.Module]:
        """The copy, under the trainer's autocast. ConfigError for another model than the policy."""
        if name != "policy":
            raise ConfigError(f"rollout.ahead: only the policy can be drawn from, not the {name}")
        with torch.autocast(*self._precision):
            yield self.network

    def together(self) -> AbstractContextManager[None]:
        """Nothing to do: the copy is whole in every process."""
        return nullcontext()


def copied(models: Any) -> PolicyCopy | None:
    """`models` where it is such a copy."""
    return models if isinstance(models, PolicyCopy) else None
