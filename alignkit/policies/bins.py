"""The head of a learned value: the law of the final reward after each next token, as bins."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit.errors import ModelError
from alignkit.policies.dtensors import full

FILE = "value.safetensors"  # beside the model that it was trained on
WIDTH = 128  # of the hidden layer
BIN = "bin_{}"  # the name of a bin's log-probs among a token's results


class BinHead(nn.Module):
    """MLP([h; e]) -> B bins: h [.., H] is the state before a token, e [.., H] the token's embedding.

    It starts at the uniform law. The first layer is linear, so that the parts of state and token are
    computed apart: for a whole vocabulary that is one product more, not V.
    """

    def __init__(self, hidden: int, bins: int, device: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the same start in every process and run
            torch.manual_seed(0)
            self.state = nn.Linear(hidden, WIDTH).to(device)
            self.token = nn.Linear(hidden, WIDTH, bias=False).to(device)
        self.out = nn.Linear(WIDTH, bins, device=device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Log-probs of the bins: [.., H] and [.., H], which may broadcast -> [.., B]."""
        return self.laws(self.of_states(hidden) + self.of_tokens(embedded))

    def of_states(self, hidden: Tensor) -> Tensor:
        """The states' part of the hidden layer: [.., H] -> [.., W]."""
        part: Tensor = self.state(hidden.to(self.state.weight.dtype))
        return part

    def of_tokens(self, embedded: Tensor) -> Tensor:
        """The tokens' part of it: [.., H] -> [.., W]."""
        part: Tensor = self.token(embedded.to(self.token.weight.dtype))
        return part

    def laws(self, mixed: Tensor) -> Tensor:
        """Log-probs of the bins from the sum of both parts: [.., W] -> [.., B]."""
        logits: Tensor = self.out(nn.functional.gelu(mixed))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def save_bins(head: BinHead, folder: Path | str, *, writes: bool = True) -> None:
    """Write the head beside its model. Processes that hold shards of it all call this, and one of
    them `writes`.
    """
    tensors = {
        name: full(value.detach()).cpu().contiguous() for name, value in head.state_dict().items()
    }
    if writes:
        save_file(tensors, str(Path(folder) / FILE))


def load_bins(folder: Path, hidden: int, device: Any = None) -> BinHead:
    """The head that `save_bins` wrote. ModelError where there is none, or it is of another model."""
    file = folder / FILE
    if not file.is_file():
        raise ModelError(
            f"{folder} holds no learned value ({FILE}); train one with the objective token_value"
        )
    tensors = load_file(str(file), device=str(device or "cpu"))
    width = tensors["state.weight"].shape[1]
    if width != hidden:
        raise ModelError(
            f"{file} belongs to a model of width {width}, the one beside it has {hidden}"
        )
    head = BinHead(hidden, len(tensors["out.bias"]), device)
    head.load_state_dict(tensors)
    return head.eval()
