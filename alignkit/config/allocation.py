"""`rollout.allocate` of a recipe. Imports pydantic alone."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from alignkit.config.section import Section


class AllocateConfig(Section):
    """Sample budgets: prompts get numbers of completions of their own, `rollout.completions` on
    average (GVM, Yao et al. 2025, arXiv:2505.02391).
    """

    pilot: PositiveInt = Field(
        4, description="completions of every prompt that are sampled first; they count as its own"
    )
    threshold: float = Field(0.0, description="a completion passes with a score above this")
    alpha: NonNegativeFloat = Field(
        1e-3, description="keeps hard prompts from taking everything; 0 = least variance"
    )
    power: NonNegativeFloat = Field(
        2.0, description="how fast alpha acts: alpha / (pass rate)^(power - 1)"
    )
    norm: Literal["one", "head"] = Field(
        "one",
        description="head: prompts whose accepted pilots have large gradients in the head get more; "
        "one: all count alike",
    )
