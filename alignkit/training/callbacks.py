"""A user's callbacks, told of the loop's events under transformers' names."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from alignkit.policies.pair import PolicyPair
from alignkit.training.job import Job


class Callbacks:
    """The job's callbacks, each a transformers `TrainerCallback`: on_train_begin, on_step_begin,
    on_step_end, on_evaluate, on_log, on_save, on_train_end.

    `args` has the fields of the recipe's `train` section, `max_steps` and `output_dir`. Of what a
    callback may ask for in its `control`, `should_training_stop` is heard; all processes then stop
    after the same step.
    """

    def __init__(self, job: Job, optimizer: Any) -> None:
        self.callbacks: Sequence[Any] = job.callbacks
        if not self.callbacks:
            return

        # With this comes peft, which a run without callbacks and adapters has no use for.
        from transformers.trainer_callback import (
            CallbackHandler,
            DefaultFlowCallback,
            TrainerControl,
            TrainerState,
        )

        pair = job.pair
        model = pair.base.model if isinstance(pair, PolicyPair) else pair.module
        # Without the default flow transformers warns; the loop decides by itself when to log, to
        # evaluate and to save, so it is taken out again.
        self.handler = CallbackHandler(  # type: ignore[no-untyped-call]
            [DefaultFlowCallback, *self.callbacks], model, pair.tokenizer, optimizer, None
        )
        self.handler.remove_callback(DefaultFlowCallback)  # type: ignore[no-untyped-call]
        self.state = TrainerState(
            max_steps=job.steps,
            is_world_process_zero=job.accelerator.is_main_process,
            is_local_process_zero=job.accelerator.is_local_main_process,
        )
        self.control = TrainerControl()
        self.args = SimpleNamespace(
            **job.config.model_dump(), max_steps=job.steps, output_dir=str(job.run.path)
        )

    def tell(self, event: str, step: int, *about: Any) -> None:
        """Tell every callback of `event` after `step` steps; `about` are its logs or metrics."""
        if not self.callbacks:
            return
        self.state.global_step = step
        call = getattr(self.handler, event)
        self.control = call(self.args, self.state, self.control, *about)

    @property
    def stop(self) -> bool:
        """Whether a callback has asked for the end of the run."""
        return bool(self.callbacks) and self.control.should_training_stop
