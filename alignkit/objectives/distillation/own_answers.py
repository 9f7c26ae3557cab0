"""Which answers a distilled policy learns from: given ones, or its own in the place of some of them."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from alignkit.batches import Adaptive, Draw
from alignkit.objectives.distillation.teacher_base import DivergenceObjective

Share = Annotated[float, Field(ge=0, le=1)]


class OwnAnswersObjective(DivergenceObjective):
    """Learns from given answers, from the policy's own, or from some of each."""

    share: Share = Field(
        0.0, description="fraction of the answers that the policy samples itself; 1: prompts alone"
    )

    share_growth: Share = Field(
        0.0, description="added to `share`, up to 1, when the held-out loss has risen (DistiLLM)"
    )
    share_tolerance: NonNegativeFloat = Field(
        0.1, description="share_growth: how much the held-out loss has to rise for that, in nats"
    )
    replay: NonNegativeInt = Field(
        0,
        description="own answers that are kept and come back, the more the later; 1000 in DistiLLM",
    )

    teacher_top: PositiveInt | None = Field(
        None,
        description="own answers: a token outside of the teacher's so many likeliest is replaced "
        "by the teacher's own (SKD); null = never",
    )

    @model_validator(mode="after")
    def _own_answers_beside_given_ones(self) -> Self:
        if self.share == 1 and (self.share_growth or self.replay):
            raise ValueError(
                "share_growth and replay are for own answers beside given ones; with share 1 there "
                "are no given ones: leave them out, or begin with a smaller share"
            )
        if self.teacher_top and not self._has_own_answers:
            raise ValueError("teacher_top changes own answers; with share 0 there are none")
        if self.replay and not self._has_own_answers:
            raise ValueError(
                "replay keeps own answers; with share 0 there are none: set share or share_growth"
            )
        return self

    @property
    def _has_own_answers(self) -> bool:
        """Whether a row may have one, at the start or later."""
        return self.share > 0 or self.share_growth > 0

    @property
    def own_answers(self) -> tuple[Draw, ...]:
        """The plan's draws."""
        if self.share == 1:
            return (Draw(top=self.teacher_top),)
        adaptive = Adaptive(self.share_growth, self.share_tolerance, self.replay)
        own = Draw(1, share=self.share, adaptive=adaptive, top=self.teacher_top)
        return (own,) if self._has_own_answers else ()
