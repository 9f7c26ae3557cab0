"""Statistics of completions and runs: pure functions of arrays."""

from alignkit.metrics.rewardbench2 import rewardbench2

__all__ = ["rewardbench2"]
