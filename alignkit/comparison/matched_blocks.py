"""What `compare.match_kl` led to, in the report of a comparison."""

from alignkit.comparison.verdicts import verdict_items
from alignkit.evaluation.blocks import Block, Heading, Table, Text
from alignkit.evaluation.page import MISSING, Row, number


def matched_blocks(results: Row) -> list[Block]:
    """Which run ended near each KL, the verdicts between those runs, and what the search cost."""
    matched = results.get("matched")  # results of earlier versions have none
    if not matched or not matched["targets"]:
        return []

    rows = []
    for row in matched["targets"]:
        ending = number(row["kl"]) if row["setting"] else f"not reached: {row['words']}"
        rows.append([row["label"], f"{row['target']:g}", row["setting"] or MISSING, ending])
    price = [
        [row["label"], str(row["runs"]), str(row["searched"]), f"{row['cpu_seconds']:.0f}"]
        for row in matched["price"]
    ]

    text = (
        "More runs of each objective were trained until one ended within 10 % of each KL; a run that "
        "left the task's grammar with more than 1 % of its mass counts for nothing. At each KL the "
        "verdicts are between the runs that ended there, each with its own share of the way "
        "(the efficiency where the optimum is known, else the gain over sqrt(KL))."
    )
    return [
        Heading("At the same KLs"),
        Text(text),
        Table(["objective", "KL wanted", "setting", "KL"], rows),
        *verdict_items(matched["pairs"]),
        Text("What each objective cost in all, the runs of the search included:"),
        Table(["objective", "runs", "of the search", "CPU seconds"], price),
    ]
