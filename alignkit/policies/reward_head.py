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


def start_reward_head(head: nn.Linear, config: Any, seed: int) -> None:
    """Draw the weights of a fresh head as transformers draws a sequence classifier's after
    `torch.manual_seed(seed)`, and so TRL's reward trainer: normal, as wide as `config` of the language
    model says. A reward head and a reward model of one seed then start as the same function.
    """
    width = getattr(config.get_text_config(), "initializer_range", None) or 0.02
    weight = torch.empty(head.weight.shape)
    weight.normal_(0, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(weight)


def save_reward_head(head: nn.Linear, folder: Path | str, *, writes: bool = True) -> None:
    """Write the head beside its model. Processes that hold shards of it all call this, and one of
    them `writes`.
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
