"""Elastic Reset: back to a moving average of the weights every so many steps, and the average back to
where training began (Noukhovitch et al. 2023, arXiv:2312.07551).
"""

from collections.abc import Mapping

from torch import Tensor

from alignkit.config.train import ResetConfig
from alignkit.policies.dtensors import local
from alignkit.policies.pair import PolicyPair

MODEL = "model."  # the policy's own weights; heads of values and moving anchors are left alone


class ElasticReset:
    """m <- decay m + (1 - decay) theta after every step; after every `every` steps theta <- m, and
    then m <- theta_0. The optimiser's moments stay as they are.

    `tensors` is what a checkpoint holds: the average and the start, shards where the policy's are.
    """

    def __init__(self, pair: PolicyPair, config: ResetConfig) -> None:
        self.pair = pair
        self.config = config
        weights = _of_model(pair.state())
        self.tensors = {f"start.{name}": value for name, value in weights.items()}
        self.tensors |= {f"average.{name}": value.clone() for name, value in weights.items()}

    def after_step(self, step: int) -> None:
        """Follow the policy after optimiser step `step`, counted from 1, and reset it when due."""
        weights = _of_model(self.pair.tensors())
        for name, value in weights.items():
            average = local(self.tensors[f"average.{name}"])
            average.lerp_(local(value).to(average.device), 1 - self.config.decay)
        if step % self.config.every:
            return

        averages = {name: self.tensors[f"average.{name}"] for name in weights}
        self.pair.load_state({**self.pair.state(), **averages})
        for name in weights:
            self.tensors[f"average.{name}"].copy_(self.tensors[f"start.{name}"])


def _of_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(MODEL)}
