"""The only training loop. It knows plans, bundles and terms; it never learns which objective it
runs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from alignkit.batches import Bundle
from alignkit.config.train import TrainConfig
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import ConfigError, NumericsError, ResourceError
from alignkit.objectives.base import Objective
from alignkit.policies.pair import PolicyPair
from alignkit.sources.dataset import Source
from alignkit.training import checkpoint
from alignkit.training.guard import BrokenStep, broken_weights
from alignkit.training.progress import TrainProgress
from alignkit.training.reduction import Metrics, Reducer
from alignkit.training.run_folder import RunFolder
from alignkit.training.signals import Interrupted, Signals
from alignkit.training.snapshot import Counters, Snapshot, seed_everything
from alignkit.training.updates import UPDATES


@dataclass
class Job:
    """Everything one run needs; built by `alignkit.runs.launch` from a recipe, or by hand."""

    objective: Objective
    pair: PolicyPair
    source: Source
    config: TrainConfig
    run: RunFolder
    accelerator: Accelerator
    steps: int
    micro_batch_tokens: int = 4096
    recipe: str = ""  # resolved YAML
    # what a checkpoint must match to be resumed
    identity: Mapping[str, Any] = field(default_factory=dict)
    # held-out bundles of this rank, perhaps none of them; None: on no rank
    evaluation: Sequence[Bundle] | None = None
    measure: Callable[[], Metrics] | None = None  # further held-out figures, over all ranks
    samples: Callable[[int], list[dict[str, Any]]] | None = None  # step -> rows for samples.jsonl
    card: Callable[[Metrics], str] | None = None  # last metrics -> the run's README
    notes: Sequence[str] = ()  # said once at the start


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    metrics: Metrics  # of the last step, and the last evaluation's `eval_` names
    resumed_from: int = 0
    stopped_early: bool = False


def train(job: Job, resume: str | None = None) -> Result:
    """Run `job` to its last step. `resume` is None, "auto" or a checkpoint folder."""
    return _Loop(job).run(resume)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The schedule: linear warm-up, then constant, or down to 0 after the last step (linear,
    cosine).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        config.schedule
    ]
    return config.learning_rate * factor


def make_optimizer(
    config: TrainConfig, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay leaves vectors (norms, biases) alone."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas, fused=True)


class _Loop:
    def __init__(self, job: Job):
        self.job = job
        self.config = job.config
        self.pair = job.pair
        self.metric = job.config.metric
        seed_everything(self.config.seed)
        make = partial(make_optimizer, self.config)
        self.optimizer = self.pair.prepare(job.accelerator, make, sharded=self.config.shard)
        self.reducer = Reducer(
            job.objective,
            self.pair,
            job.accelerator,
            job.micro_batch_tokens,
            self.config.max_grad_norm,
        )
        self.update = UPDATES[job.objective.plan.update]
        self.average = (
            {k: v.clone() for k, v in self.pair.state().items()} if self.config.ema_decay else {}
        )
        self.count = Counters()
        self.snapshot = Snapshot(
            self.pair, self.optimizer, job.source, self.average, self.count, job.accelerator
        )
        self.signals = Signals()
        self.began: float | None = None  # set when the first step begins

    def run(self, resume: str | None) -> Result:
        job = self.job
        with raise_on_all_ranks(job.accelerator):
            found, notes = job.run.find(resume, job.identity)
        start = found.step if found else 0
        if job.run.finished:
            done = job.run.last_step()
            self._say_only(f"{job.run.path} is finished; nothing to do")
            return Result(done, {}, done)
        if found:
            self._restore(found)
        with raise_on_all_ranks(job.accelerator):
            job.run.start(job.recipe, start)
        step = start
        metrics = {}
        stop = False
        with (
            self.signals,
            TrainProgress(job.steps, start, enabled=job.accelerator.is_main_process) as progress,
        ):
            for note in (*job.notes, *self.pair.notes, *notes):
                progress.say(note)
            self._samples(start, resumed=start > 0)
            while step < job.steps and not stop:
                metrics = self._step(step, progress)
                step += 1
                stop = self._after(step, metrics, progress)
            self._finish(step, metrics, progress, stop)
        return Result(step, {**metrics, **self.count.evaluated}, start, stop)

    def _step(self, step: int, progress: TrainProgress) -> Metrics:
        self.began = self.began or time.monotonic() - self.count.elapsed
        rate = learning_rate(self.config, step, self.job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics = self._moved(step, progress)
        self.count.tokens = self.reducer.tokens
        self.count.elapsed = time.monotonic() - self.began
        row = {
            "step": step + 1,
            "time": round(self.count.elapsed, 3),
            **metrics,
            "lr": rate,
            "tokens": self.count.tokens,
        }
        return {**row, **self.job.source.metrics}

    def _moved(self, step: int, progress: TrainProgress) -> Metrics:
        """Take the step; one that is not finite is left out as long as `train.max_skipped_steps`
        allows, and counted.
        """
        halves = iter(range(2))

        def collect() -> Sequence[Bundle]:
            with self.pair.whole() if self.job.objective.plan.samples else nullcontext():
                return self.job.source.collect(step, next(halves))

        try:
            metrics = self.update(collect, self.reducer.backward, self.pair, self.optimizer)
        except BrokenStep as error:
            if self.count.skipped >= self.config.max_skipped_steps:
                skipped = (
                    f" ({self.count.skipped} steps were skipped before)"
                    if self.count.skipped
                    else ""
                )
                raise NumericsError(
                    f"step {step + 1}: {error}. {self.job.run.last_good()}{skipped}"
                ) from error
            self.optimizer.zero_grad()
            self.count.skipped += 1
            progress.say(
                f"step {step + 1} is skipped, {self.count.skipped} of {self.config.max_skipped_steps} allowed: {error}"
            )
            return {"skipped": float(self.count.skipped)}
        except NumericsError as error:  # a reward, a judge or a sampler on this rank
            raise NumericsError(f"step {step + 1}: {error}. {self.job.run.last_good()}") from error
        except ResourceError as error:  # a sampling server, a judge's endpoint, memory
            raise ResourceError(f"step {step + 1}: {error}. {self.job.run.last_good()}") from error
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"step {step + 1}: out of memory while sampling or scoring: lower train.batch_size, rollout.completions, "
                "rollout.max_new_tokens or train.micro_batch_tokens"
            ) from error
        self.pair.after_step(step + 1)
        for name, value in self.pair.state().items() if self.average else ():
            self.average[name].lerp_(value, 1 - self.config.ema_decay)
        return metrics

    def _after(self, step: int, metrics: Metrics, progress: TrainProgress) -> bool:
        """Evaluate, log, save and look for signals after a step; True if the run ends here."""
        every = self.config
        last = step == self.job.steps
        better = False
        row = dict(metrics)
        if (
            (self.job.evaluation is not None or self.job.measure)
            and every.eval_every
            and (step % every.eval_every == 0 or last)
        ):
            row |= self._evaluate()
            better = self._better(row, step)
        with raise_on_all_ranks(self.job.accelerator):
            self.job.run.log(row)
            self.job.accelerator.log(row, step=step)  # trackers; none by default
        progress.step(step, row)
        if every.log_samples_every and step % every.log_samples_every == 0 and not last:
            self._samples(step)
        due = every.save_every and (step % every.save_every == 0) and not last
        caught = int(
            self.job.accelerator.gather(
                torch.tensor([self.signals.caught], device=self.pair.device)
            ).max()
        )
        if due or caught or (better and (every.save_every or every.early_stopping)):
            self._save(step)
        if caught:
            raise Interrupted(
                caught, f"stopped by signal {caught} after step {step}; go on with --resume auto"
            )
        return bool(every.early_stopping) and self.count.worse >= every.early_stopping

    def _evaluate(self) -> Metrics:
        found = (
            self.reducer.evaluate(self.job.evaluation) if self.job.evaluation is not None else {}
        )
        if self.job.measure:
            with self.pair.whole():
                found |= self.job.measure()
        self.count.evaluated = {f"eval_{k}": v for k, v in found.items()}
        return self.count.evaluated

    def _better(self, row: Metrics, step: int) -> bool:
        """Whether this evaluation is the best so far by `train.metric`; the best one's checkpoint
        is kept.
        """
        if self.metric == "auto":  # a job built by hand; a recipe's is resolved before
            self.metric = "eval_loss" if "eval_loss" in row else "eval_reward"
        if self.metric not in row:
            measured = ", ".join(k for k in row if k.startswith("eval_"))
            raise ConfigError(
                f"train.metric: {self.metric!r} is not measured; measured are {measured}"
            )
        sign = -1 if any(word in self.metric for word in ("reward", "accurac", "margin")) else 1
        value = sign * row[self.metric]
        if not value < self.count.best:  # not a number is no improvement
            self.count.worse += 1
            return False
        self.count.best = value
        self.count.best_step = step
        self.count.worse = 0
        return True

    def _finish(self, step: int, metrics: Metrics, progress: TrainProgress, stopped: bool) -> None:
        if stopped and self.count.best_step:
            best = self.count.best_step
            self._restore(checkpoint.load(self.job.run.checkpoints / f"step-{best}"))
            progress.say(
                f"stopped early at step {step}; model/ is step {best}, the best by {self.metric}"
            )
        if self.average:
            self.pair.load_state(self.average)
        self._check_weights(step)
        self._samples(step)
        card = self.job.card({**metrics, **self.count.evaluated}) if self.job.card else ""
        state = self.pair.whole_state(keep=self.job.run.writes)
        with raise_on_all_ranks(self.job.accelerator):
            self.job.run.save_model(partial(self.pair.save, state=state), card)

    def _samples(self, step: int, resumed: bool = False) -> None:
        if self.job.samples and not resumed and self.config.log_samples_every:
            with self.pair.whole(), raise_on_all_ranks(self.job.accelerator):
                if self.job.run.writes:
                    self.job.run.log_samples(self.job.samples(step))

    def _check_weights(self, step: int) -> None:
        """Nothing is kept that is not finite, so that every checkpoint is a good one; the guard
        looks before an update.
        """
        with raise_on_all_ranks(self.job.accelerator):
            broken = broken_weights(self.pair.base)
            if broken:
                raise NumericsError(
                    f"step {step}: its update left weights that are not finite, in {broken[0]} and {len(broken) - 1} others: "
                    f"lower train.learning_rate or set train.max_grad_norm. {self.job.run.last_good()}"
                )

    def _save(self, step: int) -> None:
        self._check_weights(step)
        tensors, state = self.snapshot.capture()
        with raise_on_all_ranks(self.job.accelerator):
            if self.job.run.writes:
                folder = self.job.run.checkpoints
                checkpoint.save(folder, step, tensors, state, self.job.identity)
                if self.count.best_step:
                    checkpoint.mark_best(folder, self.count.best_step)
                checkpoint.prune(folder, step, self.config.keep)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        self.snapshot.restore(found)
        self.reducer.tokens = self.count.tokens

    def _say_only(self, text: str) -> None:
        with TrainProgress(1, enabled=self.job.accelerator.is_main_process) as progress:
            progress.say(text)
