"""Statistics of completions and runs: pure functions of arrays."""

from alignkit.metrics.repeated import model_map, verified_at_k
from alignkit.metrics.rewardbench2 import rewardbench2

__all__ = ["model_map", "rewardbench2", "verified_at_k"]
