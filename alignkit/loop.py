"""The only training loop. It knows plans, bundles and terms; it never learns which objective it runs."""

import math
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit import checkpoint
from alignkit.batches import Bundle
from alignkit.errors import AlignkitError, CheckpointError, ConfigError
from alignkit.objectives.base import Objective
from alignkit.policies.pair import PolicyPair
from alignkit.progress import TrainProgress
from alignkit.reduction import Metrics, Reducer
from alignkit.run import RunFolder
from alignkit.train_config import TrainConfig
from alignkit.updates import UPDATES


class Source(Protocol):
    """Where the bundles of a step come from; `metrics` describes the last collection, `state` goes into checkpoints."""

    metrics: Metrics

    def collect(self, step: int, half: int) -> Sequence[Bundle]: ...
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


class Interrupted(AlignkitError):
    """SIGINT or SIGTERM ended the run after a checkpoint was written."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclass
class Job:
    """Everything one run needs; built by `alignkit.launch` from a recipe, or by hand."""

    objective: Objective
    pair: PolicyPair
    source: Source
    config: TrainConfig
    run: RunFolder
    accelerator: Accelerator
    steps: int
    micro_batch_tokens: int = 4096
    recipe: str = ""  # resolved YAML
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint must match to be resumed
    evaluation: Sequence[Bundle] = ()  # held-out bundles of this rank
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
    """The schedule: linear warm-up, then constant, or down to 0 after the last step (linear, cosine)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.learning_rate * factor


def make_optimizer(config: TrainConfig, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay leaves vectors (norms, biases) alone."""
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas, fused=True)


class _Loop:
    def __init__(self, job: Job):
        self.job, self.config, self.pair = job, job.config, job.pair
        torch.manual_seed(self.config.seed)
        random.seed(self.config.seed)
        optimizer = make_optimizer(self.config, list(self.pair.parameters()))
        self.pair.prepare(job.accelerator)
        self.optimizer = job.accelerator.prepare(optimizer)
        self.reducer = Reducer(job.objective, self.pair, job.accelerator, job.micro_batch_tokens, self.config.max_grad_norm)
        self.update = UPDATES[job.objective.plan.update]
        self.average = {k: v.clone() for k, v in self.pair.state().items()} if self.config.ema_decay else {}
        self.best, self.worse, self.metric = math.inf, 0, self.config.metric
        self.evaluated: Metrics = {}
        self.began: float | None = None  # set when the first step begins
        self.elapsed = 0.0
        self.caught = 0

    def run(self, resume: str | None) -> Result:
        job = self.job
        start, notes = self._resume(resume)
        if job.run.finished:
            self._say_only(f"{job.run.path} is finished ({start} steps); nothing to do")
            return Result(start, {}, start)
        job.run.start(job.recipe, start)
        step, metrics, stop = start, {}, False
        with self._signals(), TrainProgress(job.steps, start, enabled=job.accelerator.is_main_process) as progress:
            for note in (*job.notes, *self.pair.notes, *notes):
                progress.say(note)
            self._samples(start, resumed=start > 0)
            while step < job.steps and not stop:
                metrics = self._step(step)
                step += 1
                stop = self._after(step, metrics, progress)
            self._finish(step, metrics, progress, stop)
        return Result(step, {**metrics, **self.evaluated}, start, stop)

    def _step(self, step: int) -> Metrics:
        self.began = self.began or time.monotonic() - self.elapsed
        rate = learning_rate(self.config, step, self.job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        halves = iter(range(2))
        metrics = self.update(
            lambda: self.job.source.collect(step, next(halves)), self.reducer.backward, self.pair, self.optimizer
        )
        self.pair.after_step(step + 1)
        for name, value in self.pair.state().items() if self.average else ():
            self.average[name].lerp_(value, 1 - self.config.ema_decay)
        self.elapsed = time.monotonic() - self.began
        row = {"step": step + 1, "time": round(self.elapsed, 3), **metrics, "lr": rate, "tokens": self.reducer.tokens}
        return {**row, **self.job.source.metrics}

    def _after(self, step: int, metrics: Metrics, progress: TrainProgress) -> bool:
        """Evaluate, log, save and look for signals after a step; True if the run ends here."""
        every, last, stop = self.config, step == self.job.steps, False
        row = dict(metrics)
        if (self.job.evaluation or self.job.measure) and every.eval_every and (step % every.eval_every == 0 or last):
            row |= self._evaluate()
            stop = self._watch(row, step)
        self.job.run.log(row)
        self.job.accelerator.log(row, step=step)  # trackers; none by default
        progress.step(step, row)
        if every.log_samples_every and step % every.log_samples_every == 0 and not last:
            self._samples(step)
        due = every.save_every and (step % every.save_every == 0) and not last
        caught = int(self.job.accelerator.gather(torch.tensor([self.caught], device=self.pair.device)).max())
        if due or caught:
            self._save(step)
        if caught:
            raise Interrupted(caught, f"stopped by signal {caught} after step {step}; go on with --resume auto")
        return stop

    def _evaluate(self) -> Metrics:
        found = self.reducer.evaluate(self.job.evaluation) if self.job.evaluation else {}
        found |= self.job.measure() if self.job.measure else {}
        self.evaluated = {f"eval_{k}": v for k, v in found.items()}
        return self.evaluated

    def _watch(self, row: Metrics, step: int) -> bool:
        """Early stopping and keep-best on `train.metric`."""
        if self.metric == "auto":  # a job built by hand; a recipe's is resolved before
            self.metric = "eval_loss" if "eval_loss" in row else "eval_reward"
        if self.metric not in row:
            measured = ", ".join(k for k in row if k.startswith("eval_"))
            raise ConfigError(f"train.metric: {self.metric!r} is not measured; measured are {measured}")
        sign = -1 if any(word in self.metric for word in ("reward", "accurac", "margin")) else 1
        value = sign * row[self.metric]
        self.worse = 0 if value < self.best else self.worse + 1
        if value < self.best:
            self.best = value
            if self.config.early_stopping:
                self._save(step)
                if self.job.run.writes:
                    checkpoint.write_json(self.job.run.checkpoints / "best.json", {"step": step})
        return bool(self.config.early_stopping) and self.worse >= self.config.early_stopping

    def _finish(self, step: int, metrics: Metrics, progress: TrainProgress, stopped: bool) -> None:
        if stopped and self.best < math.inf:
            best = checkpoint.best_step(self.job.run.checkpoints)
            if best is not None:
                self._restore(checkpoint.load(self.job.run.checkpoints / f"step-{best}"))
                progress.say(f"stopped early at step {step}; model/ is step {best}, the best by {self.metric}")
        if self.average:
            self.pair.load_state(self.average)
        self._samples(step)
        card = self.job.card({**metrics, **self.evaluated}) if self.job.card else ""
        self.job.accelerator.wait_for_everyone()
        self.job.run.save_model(self.pair.save, card)

    def _samples(self, step: int, resumed: bool = False) -> None:
        if self.job.samples and self.job.run.writes and not resumed and self.config.log_samples_every:
            self.job.run.log_samples(self.job.samples(step))

    def _save(self, step: int) -> None:
        tensors, state = self.job.source.state()
        if self.job.run.writes:
            moments, groups = checkpoint.optimizer_tensors(self.optimizer)
            content = {"policy": self.pair.state(), "optimizer": moments, "source": tensors, "average": self.average}
            content["rng"] = {"torch": torch.get_rng_state()}
            version, numbers, gauss = random.getstate()
            extra = {"optimizer": groups, "source": state, "best": self.best, "worse": self.worse, "time": self.elapsed}
            extra |= {"tokens": self.reducer.tokens, "python": [version, list(numbers), gauss], "evaluated": self.evaluated}
            filled = {group: values for group, values in content.items() if values}
            checkpoint.save(self.job.run.checkpoints, step, filled, extra, self.job.identity)
            checkpoint.prune(self.job.run.checkpoints, self.config.keep)
        self.job.accelerator.wait_for_everyone()

    def _resume(self, resume: str | None) -> tuple[int, list[str]]:
        """Restore what `resume` names; the step to go on from and what to tell."""
        if resume is None:
            self.job.run.refuse_to_overwrite()
            return 0, []
        if resume == "auto":
            found, skipped = checkpoint.newest(self.job.run.checkpoints)
            notes = [f"skipped damaged checkpoint {v.path.name}: {v.reason}" for v in skipped]
            if found is None:
                return 0, [*notes, "no checkpoint yet: starting from the beginning"]
        else:
            found, notes = checkpoint.load(checkpoint.Path(resume)), []
        if self.job.run.finished:
            return found.step, notes
        differences = compare(found.identity, self.job.identity)
        if differences:
            raise CheckpointError(
                f"checkpoint {found.path.name} belongs to another run: "
                + "; ".join(differences)
                + ". Undo the change, or start without --resume in another output_dir"
            )
        self._restore(found)
        return found.step, [*notes, f"resumed from {found.path.name}"]

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        tensors, state = found.tensors, found.state
        self.pair.load_state(tensors["policy"])
        checkpoint.load_optimizer(self.optimizer, tensors.get("optimizer", {}), state["optimizer"])
        self.job.source.load_state(tensors.get("source", {}), state["source"])
        self.average = dict(tensors.get("average", {}))
        torch.set_rng_state(tensors["rng"]["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        self.best, self.worse, self.elapsed = state["best"], state["worse"], state["time"]
        self.reducer.tokens, self.evaluated = state["tokens"], state["evaluated"]

    def _say_only(self, text: str) -> None:
        with TrainProgress(1, enabled=self.job.accelerator.is_main_process) as progress:
            progress.say(text)

    @contextmanager
    def _signals(self):
        """SIGTERM and SIGINT end the run at the next step boundary; a second one ends it at once."""

        def note(signum: int, _: object) -> None:
            if self.caught:
                raise Interrupted(signum, f"stopped by a second signal {signum} before the step's end")
            self.caught = signum

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread (a notebook's executor): leave signals to the host
            before = {}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every leaf in which two identities differ, as "name: old -> new"."""
    found = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += compare(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found
