"""The only training loop.

It knows plans, bundles and terms; it never learns which objective it runs.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import CheckpointError, ConfigError, NumericsError, ResourceError
from alignkit.policies.dtensors import local
from alignkit.sources.base import Collected
from alignkit.sources.streams import StreamSource
from alignkit.training import checkpoint, shared_checkpoint
from alignkit.training.callbacks import Callbacks
from alignkit.training.computed_metrics import evaluated
from alignkit.training.elastic_reset import ElasticReset
from alignkit.training.guard import BrokenStep, broken_weights
from alignkit.training.held_out_sets import metrics_of_sets
from alignkit.training.job import Job, Result
from alignkit.training.optimizer import learning_rate, make_optimizer
from alignkit.training.progress import TrainProgress
from alignkit.training.reduction import Metrics
from alignkit.training.shared_model import save_shared_model
from alignkit.training.signals import Interrupted, Signals
from alignkit.training.snapshot import Counters, Snapshot, seed_everything
from alignkit.training.streams import reducer_of
from alignkit.training.updates import UPDATES

log = logging.getLogger("alignkit")


def train(job: Job, resume: str | None = None) -> Result:
    """Run `job` to its last step. `resume` is None, "auto" or a checkpoint folder."""
    return _Loop(job).run(resume)


class _Loop:
    """One run of a job: what changes from step to step, and the order in which it changes."""

    def __init__(self, job: Job):
        self.job = job
        self.config = job.config
        self.pair = job.pair
        self.accelerator = job.accelerator
        self.metric = job.config.metric
        seed_everything(self.config.seed)

        # The modules are prepared before anything holds on to a parameter of theirs.
        make = partial(make_optimizer, self.config, module=self.pair.module)
        self.optimizer = self.pair.prepare(self.accelerator, make, train=self.config)
        self.reducer = reducer_of(job)
        self.update = UPDATES[job.objective.plan.update]

        # The weight average that model/ gets in place of the last weights; empty without one.
        self.average: dict[str, torch.Tensor] = {}
        if self.config.ema_decay:
            self.average = self.pair.state()

        self.reset: ElasticReset | None = None
        if self.config.reset is not None:
            self.reset = ElasticReset(self.pair, self.config.reset)

        self.counters = Counters()
        self.snapshot = Snapshot(
            self.pair,
            self.optimizer,
            job.source,
            self.average,
            self.counters,
            self.accelerator,
            {} if self.reset is None else self.reset.tensors,
        )
        self.signals = Signals()
        self.callbacks = Callbacks(job, self.optimizer)
        self.is_saved = False  # whether the run has a checkpoint to go on from
        self.began: float | None = None  # on the clock, set when the first step begins

    def run(self, resume: str | None) -> Result:
        """Take every step that is left, then write the model."""
        job = self.job
        with raise_on_all_ranks(self.accelerator):
            is_done = resume is not None and job.run.is_result_of(job.identity)
        if is_done:
            return self._nothing_to_do()

        with raise_on_all_ranks(self.accelerator):
            resumed, search_notes = job.run.find(resume, job.identity, job.steps)
        start = resumed.step if resumed else 0
        if resumed:
            self._restore(resumed)
            self.is_saved = True
        with raise_on_all_ranks(self.accelerator):
            search_notes += job.run.start(job.recipe, start)

        # A run that was stopped after its last step has nothing left but to write its model.
        step = start
        metrics: Metrics = job.run.logged(start) if resumed else {}
        stop_early = self._stops_early()
        progress = TrainProgress(job.steps, start, enabled=self.accelerator.is_main_process)
        with self.signals, progress:
            for note in (*job.notes, *self.pair.notes, *search_notes):
                self._inform(note)
            if not resumed:
                self._log_samples(step)
            self.callbacks.tell("on_train_begin", step)

            while step < job.steps and not stop_early:
                metrics = self._step(step)
                step += 1
                stop_early = self._after_step(step, metrics, progress)
            self._finish(step, metrics, self._stops_early())
            self.callbacks.tell("on_train_end", step)
        return Result(step, {**metrics, **self.counters.evaluated}, start, stop_early)

    def _nothing_to_do(self) -> Result:
        last_step = self.job.run.last_step()
        with TrainProgress(1, enabled=self.accelerator.is_main_process):
            self._inform(f"{self.job.run.path} is finished; nothing to do")
        return Result(last_step, {}, last_step)

    def _stops_early(self) -> bool:
        limit = self.config.early_stopping
        return bool(limit) and self.counters.worse >= limit

    def _step(self, step: int) -> Metrics:
        """Take step `step`, counted from 0; its row of metrics.jsonl."""
        if self.began is None:
            self.began = time.monotonic() - self.counters.elapsed

        self.callbacks.tell("on_step_begin", step)
        rate = learning_rate(self.config, step, self.job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics = self._update_or_skip(step)

        self.counters.tokens = self.reducer.tokens
        self.counters.elapsed = time.monotonic() - self.began
        row = {
            "step": step + 1,
            "time": round(self.counters.elapsed, 3),
            **metrics,
            "lr": rate,
            "tokens": self.counters.tokens,
            **self.job.source.metrics,
        }
        if isinstance(self.job.source, StreamSource):
            self.job.source.observe(row)
        return row

    def _update_or_skip(self, step: int) -> Metrics:
        """Update the policy. A step that is not finite is left out and counted, as long as
        `train.max_skipped_steps` allows it.
        """
        halves = iter(range(2))

        def collect() -> Collected:
            return self.job.source.collect(step, next(halves))

        try:
            with self._explained(step):
                metrics = self.update(collect, self.reducer.backward, self.pair, self.optimizer)
        except BrokenStep as error:
            if self.counters.skipped >= self.config.max_skipped_steps:
                raise NumericsError(self._broken_step(step, error)) from error
            self.optimizer.zero_grad()
            self.counters.skipped += 1
            self._inform(
                f"step {step + 1} is skipped, {self.counters.skipped} of {self.config.max_skipped_steps} allowed: {error}"
            )
            return {"skipped": float(self.counters.skipped)}

        # What follows the policy: a reset, moving anchors, then the weight average.
        if self.reset is not None:
            self.reset.after_step(step + 1)
        self.pair.after_step(step + 1)
        if self.average:
            for name, value in self.pair.tensors().items():
                average = local(self.average[name])
                average.lerp_(local(value).to(average.device), 1 - self.config.ema_decay)
        return metrics

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Errors in the block say in which step they happened and where the run can be taken up."""
        try:
            yield
        except BrokenStep:
            raise  # perhaps it is skipped
        except NumericsError as error:  # a reward, a judge or a sampler on this rank
            raise NumericsError(f"step {step + 1}: {error}. {self.job.run.last_good()}") from error
        except ResourceError as error:  # a sampling server, a judge's endpoint, memory
            raise ResourceError(f"step {step + 1}: {error}. {self.job.run.last_good()}") from error
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"step {step + 1}: out of memory while sampling or scoring: lower train.batch_size, rollout.completions, "
                "rollout.max_new_tokens or train.micro_batch_tokens"
            ) from error

    def _broken_step(self, step: int, error: BrokenStep) -> str:
        message = f"step {step + 1}: {error}. {self.job.run.last_good()}"
        if self.counters.skipped:
            message += f" ({self.counters.skipped} steps were skipped before)"
        return message

    def _after_step(self, step: int, metrics: Metrics, progress: TrainProgress) -> bool:
        """Evaluate, log and save after `step` steps, and look for signals.

        True if the run ends here.
        """
        config = self.config
        last = step == self.job.steps
        row = dict(metrics)

        self.callbacks.tell("on_step_end", step)

        is_best = False
        if self._measures_held_out() and _due(config.eval_every, step, or_at=last):
            evaluated = self._evaluate()
            self.callbacks.tell("on_evaluate", step, evaluated)
            row |= evaluated
            is_best = self._is_best(row, step)

        self.callbacks.tell("on_log", step, row)
        with raise_on_all_ranks(self.accelerator):
            self.job.run.log(row)
            self.accelerator.log(row, step=step)  # the recipe's trackers; none by default
        progress.step(step, row)
        if _due(config.log_samples_every, step) and not last:
            self._log_samples(step)

        # A signal or a callback may reach one rank alone: all of them stop after the same step.
        own = torch.tensor([[self.signals.caught, self.callbacks.stop]], device=self.pair.device)
        signum, stop = self.accelerator.gather(own).amax(0).tolist()

        save_best = is_best and (config.save_every or config.early_stopping)
        if (_due(config.save_every, step) and not last) or signum or save_best:
            self._save(step)
        if signum:
            raise Interrupted(
                signum, f"stopped by signal {signum} after step {step}; go on with --resume auto"
            )
        return self._stops_early() or bool(stop)

    def _measures_held_out(self) -> bool:
        return self.job.evaluation is not None or self.job.measure is not None

    def _evaluate(self) -> Metrics:
        """Metrics of the held-out data, under `eval_` names."""
        metrics: Metrics = {}
        if self.job.evaluation is not None:
            given = self.job.evaluation
            sets = given if isinstance(given, Mapping) else {"": given}
            compute = self.job.compute_metrics
            metrics = metrics_of_sets(
                lambda name, rows: evaluated(self.reducer.of(name), compute, rows), sets
            )
        if self.job.measure:
            metrics |= self.job.measure()

        self.counters.evaluated = {f"eval_{name}": value for name, value in metrics.items()}
        if self.job.observe is not None:
            self.job.observe(self.counters.evaluated)
        return self.counters.evaluated

    def _is_best(self, row: Metrics, step: int) -> bool:
        """Whether this evaluation is the best so far by `train.metric`. The checkpoint of the best
        one is kept.
        """
        if self.metric == "auto":  # a job built by hand; a recipe's is resolved before
            self.metric = "eval_loss" if "eval_loss" in row else "eval_reward"
        if self.metric not in row:
            measured = ", ".join(name for name in row if name.startswith("eval_"))
            raise ConfigError(
                f"train.metric: {self.metric!r} is not measured; measured are {measured}"
            )

        sign = 1 if self.config.goal_of(self.metric) == "min" else -1
        return self.counters.is_best(self.metric, sign * row[self.metric], step)

    def _finish(self, step: int, metrics: Metrics, stopped: bool) -> None:
        """Write the model and the card: of the best step after an early stop, else of the last."""
        run = self.job.run
        if self.config.save_every and not self.is_saved:
            self._save_last(step)
        if stopped and self.counters.best_step:
            self._restore_best(step, self.counters.best_step)
        if self.average:
            self.pair.load_state(self.average)

        self._check_weights(step)
        self._log_samples(step)
        card = self.job.card({**metrics, **self.counters.evaluated}) if self.job.card else ""
        write = partial(self.pair.save, writes=run.writes)
        if self.pair.shards is None:
            with raise_on_all_ranks(self.accelerator):
                run.save_model(write, card, self.job.identity)
        else:
            save_shared_model(run, write, card, self.job.identity, self.accelerator)

    def _save_last(self, step: int) -> None:
        """Save the last step of a run that has no checkpoint: should model/ not fit on the disk, or
        more steps be wanted, the run can go on from it. A disk that refuses is no reason to stop.
        """
        try:
            self._save(step)
        except CheckpointError as error:
            self._inform(f"{error}; model/ is written nevertheless")

    def _restore_best(self, step: int, best: int) -> None:
        """Put back the best step after an early stop; where its checkpoint is damaged, the newest
        one that is whole, and where there is none, leave the last step's weights.
        """
        folder = self.job.run.checkpoints
        stopped = f"stopped early at step {step}; model/ is step"
        reason = checkpoint.check(folder / f"step-{best}")
        if reason is None:
            self._restore(checkpoint.load(folder / f"step-{best}"))
            self._inform(f"{stopped} {best}, the best by {self.metric}")
            return

        damage = (
            f"the checkpoint of the best step by {self.metric}, step-{best}, is damaged: {reason}"
        )
        try:
            newest, _ = checkpoint.newest(folder)
        except CheckpointError:  # none is whole
            newest = None
        if newest is not None:
            self._restore(newest)
        self._inform(f"{damage}; {stopped} {newest.step if newest else step} instead")

    def _log_samples(self, step: int) -> None:
        if not (self.job.samples and self.config.log_samples_every):
            return
        with raise_on_all_ranks(self.accelerator), self.pair.together():
            if self.job.run.writes:
                self.job.run.log_samples(self.job.samples(step))

    def _check_weights(self, step: int) -> None:
        """NumericsError unless all weights are finite, so that every checkpoint is a good one. The
        guard looks at a step before its update, this after it.
        """
        with raise_on_all_ranks(self.accelerator):
            broken = broken_weights(self.pair.base)
            if broken:
                raise NumericsError(
                    f"step {step}: its update left weights that are not finite, in {broken[0]} and {len(broken) - 1} others: "
                    f"lower train.learning_rate or set train.max_grad_norm. {self.job.run.last_good()}"
                )

    def _save(self, step: int) -> None:
        self._check_weights(step)
        tensors, state = self.snapshot.capture()
        folder = self.job.run.checkpoints
        identity = self.job.identity
        is_shared = self.pair.shards is not None
        if is_shared:
            shared_checkpoint.save(folder, step, tensors, state, identity, self.accelerator)

        with raise_on_all_ranks(self.accelerator):
            if self.job.run.writes:
                if not is_shared:
                    checkpoint.save(folder, step, tensors, state, identity)
                if self.counters.best_step:
                    checkpoint.mark_best(folder, self.counters.best_step)
                checkpoint.prune(folder, step, self.config.keep)
        self.is_saved = True
        self.callbacks.tell("on_save", step)

    def _inform(self, message: str) -> None:
        """One line for the user, from the first process alone."""
        if self.accelerator.is_main_process:
            log.info(message)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self.snapshot.restore(saved)
        self.reducer.tokens = self.counters.tokens


def _due(every: int, step: int, *, or_at: bool = False) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step` steps;
    `or_at` adds a step to those.
    """
    return every > 0 and (step % every == 0 or or_at)
