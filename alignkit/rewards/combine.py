"""Several rewards as one: checked, weighted, counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from alignkit.errors import ConfigError, DataError
from alignkit.rewards.by_token import TokenRewards, added, split
from alignkit.rewards.checks import checked
from alignkit.rewards.functions import CONTEXT, FunctionReward


@dataclass(frozen=True)
class Part:
    """One reward of the sum."""

    name: str
    call: Callable[..., Any]
    weight: float = 1.0
    drop: bool = False  # rows with nan or inf are set aside; False: they stop the run
    to_go: bool = False  # its rewards of single tokens stay apart; False: they are summed


class Reward:
    """The weighted sum of its parts: reward(prompts, completions,
    **columns) -> one float or None per completion.

    A part that answers None for a completion (not applicable) is left out of its sum. None is a
    completion that no part applies to, or that a part set aside. It is itself a reward function for
    TRL's GRPOTrainer. `metrics` describes the last call: `rewards/NAME/mean` and `/std` over the
    rows a part applies to, `/set_aside` (how many were nan, infinite or raised), and what the part
    itself reports. `token_rewards` are those of the last call, one list of numbers for each
    completion, where a part keeps rewards of single tokens apart; else None.
    """

    def __init__(self, parts: Sequence[Part]):
        if not parts:
            raise ConfigError("rewards: the list is empty; give at least one reward")
        self.parts = list(parts)
        self.metrics = dict[str, float]()
        self.token_rewards: TokenRewards | None = None
        self.__name__ = "_".join(part.name for part in parts)  # TRL's name for it

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Raises NumericsError for nan or inf (also of the weighted sum), DataError for answers of the wrong shape or type and
        for exceptions, ResourceError for a hang; each names the function and the rows.
        """
        self.metrics = {}
        ids = columns.get("completion_ids")
        totals: list[float | None] = [None] * len(completions)
        keeps_tokens = ids is not None and any(part.to_go for part in self.parts)
        by_token: TokenRewards = [[0.0] * len(row) for row in ids or ()] if keeps_tokens else []
        aside: set[int] = set()

        for part in self.parts:
            raw = part.call(prompts, completions, **_columns_for(part, columns))
            scores, of_tokens = split(part.name, raw, ids)
            values, bad_rows = checked(part.name, scores, prompts, completions, drop=part.drop)
            if keeps_tokens:
                apart = of_tokens if part.to_go else []
                by_token = added(by_token, apart, values, weight=part.weight)
            if bad_rows and len(bad_rows) == len(values):
                raise DataError(
                    f"reward {part.name} has no finite value for any of the {len(values)} "
                    "completions"
                )

            aside.update(bad_rows)
            for row, value in enumerate(values):
                if value is not None:
                    totals[row] = (totals[row] or 0.0) + part.weight * value
            self._describe(part, values, set_aside=len(bad_rows))

        self.token_rewards = by_token if keeps_tokens else None
        sums = [None if row in aside else total for row, total in enumerate(totals)]
        return checked(self.__name__, sums, prompts, completions, drop=False)[0]

    def close(self) -> None:
        """End the processes of verifiers."""
        for part in self.parts:
            if hasattr(part.call, "close"):
                part.call.close()

    def _describe(self, part: Part, values: Sequence[float | None], *, set_aside: int) -> None:
        applicable = [value for value in values if value is not None]
        if applicable:
            self.metrics |= {
                f"rewards/{part.name}/mean": fmean(applicable),
                f"rewards/{part.name}/std": pstdev(applicable),
            }
        if part.drop:
            self.metrics[f"rewards/{part.name}/set_aside"] = set_aside
        self.metrics |= {
            f"rewards/{part.name}/{name}": value
            for name, value in getattr(part.call, "metrics", {}).items()
        }


def _columns_for(part: Part, columns: dict[str, Any]) -> dict[str, Any]:
    """What a part is called with: only users' functions get the trainer's state and its logging."""
    if isinstance(part.call, FunctionReward):
        return columns
    return {name: column for name, column in columns.items() if name not in CONTEXT}
