"""What all sections of a recipe have in common. Imports pydantic alone."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe. Unknown fields are errors, numbers are finite, defaults are checked like
    given values, and nothing changes after reading.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),  # fields may be called `model` and `model_...`
    )
