"""The recipe's `teacher` section. Imports pydantic alone."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from alignkit.config.section import Section


class TeacherConfig(Section):
    """Which model the objectives of distillation learn from.

    It is frozen, and it must have the policy's tokenizer.
    """

    name_or_path: str = Field(
        "task",
        min_length=1,
        description="a hub name, a model or adapter folder, or `task` for the embedded world's",
    )
    revision: str | None = Field(None, description="hub revision; pin it for repeatable runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the weights; auto: as the policy's"
    )
    top: PositiveInt | None = Field(
        None,
        description="fixed data: score the teacher once, and keep its most likely tokens, so many "
        "at each position, and the mass of all others; null = the whole law, live",
    )
    store: str | None = Field(
        None, description="with `top`: a folder that keeps them for later runs on the same rows"
    )

    @model_validator(mode="after")
    def _a_store_holds_the_top(self) -> Self:
        if self.store is not None and self.top is None:
            raise ValueError(
                "`store` keeps the teacher's most likely tokens; say how many with `top`"
            )
        return self
