"""The decoders of a comparison in its report."""

from alignkit.evaluation.blocks import Block, Table, Text
from alignkit.evaluation.page import Row, number


def decoder_blocks(results: Row) -> list[Block]:
    """The decoders beside the grid, with what is known of their KL and their price."""
    if not results.get("decoders"):
        return []
    rows = []
    for row in results["decoders"]:
        exact = row["exact"]
        kl = number(exact.get("kl", row["kl"]))
        if row["kl_low"] is not None:
            kl = f"{number(row['kl_low'])} to {kl}"
        price = [f"{row['sampled']:.1f}", f"{row['reward_calls']:.1f}"]
        rows.append(
            [row["label"], row["setting"], kl, number(exact.get("score", row["score"])), *price]
        )
    header = ["decoder", "setting", "KL", "score", "tokens", "reward calls"]
    text = (
        "Decoders: the price is what one completion costs, in tokens that are computed and texts "
        "that the reward scores. A KL of which only an interval is known is compared by its upper end."
    )
    return [Text(text), Table(header, rows)]
