"""The reward head of a language model: what a value head learned of whole completions, as a file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alignkit.config.model import REWARD_HEAD
from alignkit.errors import ModelError
from alignkit.policies.dtensors import full

FILE = REWARD_HEAD


def save_reward_head(head: nn.Linear, folder: Path | str, *, writes: bool = True) -> None:
    """Write the head beside its model. Processes that hold shards of it all call this, and one of
    them `writes`.

    Its bias is left out: only differences of rewards are learned, and classifiers have none.
    """
    weight = full(head.weight.detach()).cpu().contiguous()
    if writes:
        save_file({"weight": weight}, str(Path(folder) / FILE))


def has_reward_head(folder: Path | str) -> bool:
    """Whether a model's folder holds such a head."""
    return (Path(folder) / FILE).is_file()


def put_reward_head(classifier: Any, folder: Path | str) -> None:
    """Give a sequence classifier of one output, loaded from `folder`, the head that is there, and
    mark it as one that reads a text before its end token.

    ModelError where the classifier's head is more than a product, or of another width.
    """
    weight = load_file(str(Path(folder) / FILE))["weight"]
    score: Any = getattr(classifier, "score", None)
    is_product = isinstance(score, nn.Linear) and score.bias is None
    if not is_product or score.weight.shape != weight.shape:
        raise ModelError(
            f"{folder}: the reward head is one product of width {weight.shape[1]}, and the sequence "
            f"classifier of this architecture ({type(classifier).__name__}) has another head"
        )
    with torch.no_grad():
        score.weight.copy_(weight)
    classifier.config.alignkit_before_end = True
