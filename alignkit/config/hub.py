"""The recipe's `hub` section. Imports pydantic alone."""

import re

from pydantic import Field, field_validator

from alignkit.config.section import Section

# A name on the hub: NAME or OWNER/NAME.
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")


class HubConfig(Section):
    """Where the finished model is pushed."""

    push: str = Field(description="the model's name on the hub: NAME or OWNER/NAME")
    private: bool = Field(True, description="whether the repository is private")

    @field_validator("push")
    @classmethod
    def _a_name(cls, push: str) -> str:
        if not HUB_NAME.fullmatch(push) or "--" in push or ".." in push or push.endswith(".git"):
            raise ValueError(
                f"{push!r} is no name on the hub; write NAME or OWNER/NAME with letters, digits, "
                "`-`, `_` and `.`"
            )
        return push
