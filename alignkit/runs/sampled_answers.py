"""Answers of a finished model to the prompts of a file or a task: where `alignkit pairs` and
`alignkit fit-target` begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.data.load import load_prompts
from alignkit.data.prompts import Prompt
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.protocol import Sample
from alignkit.runs.forks import forked
from alignkit.runs.trained_model import load_finished
from alignkit.tasks import Task, resolve


class SamplingRequest(Protocol):
    """What is sampled from, how often and how; the same request gives the same answers."""

    @property
    def model(self) -> str:
        """A run, a model's folder or its name."""

    @property
    def prompts(self) -> str:
        """A file, a data set, or task:NAME."""

    @property
    def samples(self) -> int:
        """Answers to each prompt."""

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, in tokens."""

    @property
    def temperature(self) -> float:
        """What the logits are divided by."""

    @property
    def seed(self) -> int:
        """The seed of the sampling noise."""


@dataclass(frozen=True)
class SampledAnswers:
    """The answers of a model, prompt by prompt."""

    prompts: Sequence[Prompt]
    samples: Sequence[Sequence[Sample]]  # by prompt
    tokenizer: Any
    task: Task | None  # where the prompts are a task's
    dropped: int  # prompts that could not be used

    @property
    def ids(self) -> list[list[list[int]]]:
        """The tokens of each answer, by prompt."""
        return [[sample.ids.tolist() for sample in samples] for samples in self.samples]


def sample_answers(request: SamplingRequest, *, forks: bool = False) -> SampledAnswers:
    """`request.samples` answers to every prompt; with `forks` an even number of at least four, each
    second one of which shares its beginning with the one before it.

    Raises what loading the model and the prompts raises.
    """
    is_task = request.prompts.startswith("task:")
    task = resolve(request.prompts) if is_task else None
    models = load_finished(request.model)
    source = task.rows("rollout") if task else request.prompts
    prompts, report = load_prompts(DataConfig(), models.tokenizer, source=source)

    sampler = HFSampler(
        models,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        seed=request.seed,
    )
    samples = sampler.sample(
        [prompt.ids for prompt in prompts],
        Draw(request.samples // 2 if forks else request.samples),
        step=0,
        prompt_ids=range(len(prompts)),
    )
    if forks:
        ids = [prompt.ids for prompt in prompts]
        samples = forked(sampler, ids, samples, request.max_new_tokens)
    dropped = report.total - len(prompts)
    return SampledAnswers(prompts, samples, models.tokenizer, task, dropped)
