"""Verdicts between pairs of objectives in the report of a comparison."""

from collections.abc import Sequence

from alignkit.evaluation.blocks import Block, Items, Table
from alignkit.evaluation.page import Row


def is_decided(pair: Row) -> bool:
    """Whether there is a difference and its interval leaves out 0."""
    if pair["difference"] is None:
        return False
    low = pair["difference"]["low"]
    high = pair["difference"]["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def verdict_items(pairs: Sequence[Row]) -> list[Block]:
    """The large differences first, then pairs without one, then those that cannot be compared."""
    decided = [pair for pair in pairs if is_decided(pair)]
    decided.sort(key=lambda pair: -abs(pair["difference"]["value"]))
    compared = [pair for pair in pairs if pair["difference"] is not None]
    undecided = [pair["words"] for pair in compared if not is_decided(pair)]
    apart = [pair["words"] for pair in pairs if pair["difference"] is None]

    blocks: list[Block] = []
    if decided:
        blocks.append(Items([pair["words"] for pair in decided]))
    if decided and undecided:
        summary = f"{len(undecided)} pairs without a difference"
        blocks.append(Table(["no difference shown"], [[words] for words in undecided], summary))
    elif undecided:
        blocks.append(Items(undecided))
    if apart:
        blocks.append(Items(apart))
    return blocks
