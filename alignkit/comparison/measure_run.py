"""Measures the models of one comparison on the same prompts, with the same sampling noise, score
and judge for all of them.
"""

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.batches import Draw
from alignkit.comparison.grid import Point, section_of
from alignkit.comparison.measurement import (
    BASE_FILE,
    RUN_FILE,
    DamagedFileError,
    Measurement,
)
from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe
from alignkit.data.load import load_prompts
from alignkit.data.read import Source, held_out
from alignkit.errors import ConfigError
from alignkit.evaluation.episodes import World
from alignkit.evaluation.exact import Listed, listed_reviews
from alignkit.evaluation.measure import Yardstick, evaluation_pair, preference_margins
from alignkit.evaluation.measurements import wins
from alignkit.files import sha256_of_json
from alignkit.judges.load import load_judge
from alignkit.metrics.intervals import Array
from alignkit.policies.pair import PolicyPair
from alignkit.rewards.load import load_rewards
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.text import decode_all
from alignkit.runs.agents import open_environments
from alignkit.runs.inputs import inputs_of
from alignkit.runs.launch import resolve_task
from alignkit.runs.trained_model import load_finished


class Measurer:
    """What every model of a comparison is measured by. It loads the prompts, the reward and the
    base model, so it is made once per process.

    ConfigError where nothing says on which prompts or by which score to compare; DataError for
    prompts that cannot be used.
    """

    def __init__(self, recipe: Recipe, *, safe: bool = False):
        self.recipe = recipe
        self.section = section_of(recipe)
        self.safe = safe
        self.task: Any = resolve_task(recipe)
        base = recipe.model.name_or_path
        self.base_name = str(self.task.model_folder) if self.task and base == "task" else base
        self.reference = load_finished(self.start)

        prompts, report = load_prompts(
            recipe.data, self.reference.tokenizer, source=self._prompt_source()
        )
        self.prompts = prompts[: self.section.max_prompts]
        self.notes = report.lines()
        self.unreadable: list[str] = []  # notes about measurements that were damaged

        self.reward = self._reward()
        self.yardstick = Yardstick(
            self.prompts,
            self.section.samples,
            recipe.rollout.max_new_tokens,
            reward=self.reward,
            world=self._world(),
        )

    @cached_property
    def key(self) -> str:
        """A hash of everything that decides what is measured of a model, the content of files and
        the code of rewards included: two measurements of the same key can be compared.
        """
        section = self.section.model_dump(
            mode="json",
            exclude={"grid", "overrides", "seeds", "workers", "decode", "match_kl"},
        )
        sections = self.recipe.model_dump(
            mode="json", include={"model", "rewards", "rollout", "data"}
        )
        texts = [prompt.text for prompt in self.prompts]
        contents = inputs_of({**sections, "compare": section})
        return sha256_of_json([[section, sections], self.base_name, texts, contents])[:16]

    @cached_property
    def listed(self) -> Listed | None:
        """The task's world, where all its outcomes can be listed and the score is its own reward."""
        if self.task is None or self.recipe.model.name_or_path != "task":
            return None
        if self.reward != self.task.reward:
            return None
        world = listed_reviews(self.recipe.data.task_source() or "")
        return Listed(world, self.base_name) if world else None

    def read_base(self) -> Measurement | None:
        """The base model's measurement; None where it is still to be made."""
        return self._read(self._base_file())

    def read_run(self, point: Point) -> Measurement | None:
        """The measurement of a run; None where it is still to be made."""
        return self._read(Path(point.recipe.output_dir) / RUN_FILE)

    def _read(self, file: Path) -> Measurement | None:
        """The measurement in a file; a file that is damaged counts as none, with a note."""
        try:
            return Measurement.read(file, self.key)
        except DamagedFileError as error:
            self.unreadable.append(f"{file} cannot be used ({error}); it is measured again")
            return None

    def measure_base(self) -> None:
        """Measure the base model and write its file.

        Where nothing can be listed, a larger pool of its samples goes with it, for the baselines.
        """
        pair = evaluation_pair(self.start, self.reference)
        measured = self.yardstick.measure_reference(pair)
        more_samples = self.section.base_samples > self.section.samples
        pool = self._pool(pair) if self.listed is None and more_samples else None
        Measurement(self.key, measured, pool=pool).write(self._base_file())

    def measure_run(self, point: Point) -> None:
        """Measure the finished run of `point` beside the base model, and write its file."""
        base = self.read_base()
        assert base is not None, "the base model is measured before the runs"
        folder = Path(point.recipe.output_dir)
        pair = evaluation_pair(folder / "model", self.reference)
        measured = self.yardstick.measure(pair, point.name, base=base.measured)

        verdicts = wins(measured, base.measured, self._judge)
        assert verdicts is not None, "there is always a score here"
        probability, valid = verdicts
        exact = asdict(self.listed.figures(pair)) if self.listed is not None else None
        margins = self._margins(point, pair)
        Measurement(self.key, measured, probability, valid, exact, margins).write(folder / RUN_FILE)

    def _base_file(self) -> Path:
        return Path(self.recipe.output_dir) / BASE_FILE

    def _pool(self, pair: PolicyPair) -> dict[str, Array]:
        """Scores and log-probs of `base_samples` samples of the base model per prompt: [P, n] each.

        The sampler knows the log-probs, so no second pass over the samples is needed.
        """
        count = self.section.base_samples
        if self.yardstick.world is not None:
            episodes = replace(self.yardstick, samples=count).measure_reference(pair)
            assert episodes.score is not None
            return {"score": episodes.score, "logp": episodes.reference_logp}
        sampler = HFSampler(
            pair, max_new_tokens=self.yardstick.max_new_tokens, seed=self.yardstick.seed
        )
        prompt_ids = [prompt.ids for prompt in self.prompts]
        drawn = sampler.sample(
            prompt_ids, Draw(count, "reference"), step=0, prompt_ids=range(len(prompt_ids))
        )

        ids = [[sample.ids for sample in row] for row in drawn]
        texts = decode_all(pair.tokenizer, ids)
        scores = replace(self.yardstick, samples=count).scores(texts, ids)
        assert scores is not None
        logps = [[float(sample.logps.double().sum()) for sample in row] for row in drawn]
        return {"score": scores, "logp": np.array(logps)}

    @property
    def start(self) -> str:
        """The model that every run starts from and that its KL is measured to."""
        adapter = self.recipe.model.adapter
        return adapter.path if adapter and adapter.path else self.base_name

    def _prompt_source(self) -> Any:
        source: Source | None = self.section.prompts or held_out(self.recipe.data)
        if source is None and self.task is None:
            place = self.recipe.origin.at(("compare",))
            raise ConfigError(
                f"{place}: nothing says which prompts to evaluate on; "
                "set compare.prompts (or data.eval) to a file"
            )
        if source is None or str(source).startswith("task:"):
            assert self.task is not None
            return self.task.rows("rollout", "eval")
        return source

    def _reward(self) -> Any:
        asked = self.section.score or self.recipe.rewards
        if asked:
            return load_rewards(asked, safe=self.safe)
        if self.task is None and self.recipe.rollout.takes_turns:
            return None  # the environment gives the score
        if self.task is None:
            place = self.recipe.origin.at(("compare",))
            example = "compare.score.0.function=my_file.py:my_function"
            raise ConfigError(f"{place}: nothing says by which score to compare; set {example}")
        return self.task.reward

    def _world(self) -> World | None:
        """What the runs act in; None where they give single answers."""
        rollout = self.recipe.rollout
        environments = open_environments(rollout, self.task)
        if environments is None:
            return None
        if self.reward is None and not (environments.about.steps or environments.about.rewards):
            place = self.recipe.origin.at(("rollout", "environment"))
            raise ConfigError(
                f"{place}: the environment has neither `get_reward` nor `step`, and nothing else "
                "says by which score to compare; give it one of them, or set compare.score"
            )
        return World(environments, rollout.turns, self.recipe.data)

    @cached_property
    def _judge(self) -> Any:
        return load_judge(self.section.judge, safe=self.safe) if self.section.judge else None

    def _margins(self, point: Point, pair: PolicyPair) -> Array | None:
        """The margins of the objective's implicit reward on held-out pairs [N]; None where there
        are no such pairs, or the objective has no implicit reward.
        """
        source = self._held_out_pairs()
        if source is None:
            return None
        objective = build_objective(point.recipe.objective, safe=self.safe)
        margins = preference_margins(pair, source, point.recipe.data, objective=objective)
        return None if margins is None else np.asarray(margins)

    def _held_out_pairs(self) -> Source | None:
        source = held_out(self.recipe.data)
        if source is None or str(source).startswith("task:"):
            return self.task.rows("pair", "eval") if self.task else None
        return source
