"""Measuring the models of one comparison: the same prompts, noise, score and judge for all of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignkit.batches import Draw
from alignkit.comparison.grid import Point, section_of
from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe
from alignkit.data.load import load_prompts
from alignkit.errors import ConfigError
from alignkit.evaluation.exact import Listed, listed_world
from alignkit.evaluation.measure import Yardstick, evaluation_pair, preference_margins
from alignkit.evaluation.measurements import Measured, wins
from alignkit.judges import load_judge
from alignkit.policies.pair import PolicyPair
from alignkit.rewards import load_rewards
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.text import decode_all
from alignkit.runs.launch import resolve_task
from alignkit.runs.trained_model import load_finished


class Appraiser:
    """What every model of the comparison is measured by. Made once per process; loads prompts,
    reward and reference.

    ConfigError where nothing says on which prompts, or by which score; DataError for prompts that
    cannot be used.
    """

    def __init__(self, recipe: Recipe, *, safe: bool = False):
        self.recipe = recipe
        self.section = section_of(recipe)
        self.safe = safe
        self.task = resolve_task(recipe)
        base = recipe.model.name_or_path
        self.base_name = str(self.task.model_folder) if self.task and base == "task" else base
        self.reference = load_finished(self._start())
        prompts, report = load_prompts(
            recipe.data, self.reference.tokenizer, source=self._prompts()
        )
        self.prompts = prompts[: self.section.max_prompts]
        self.notes = report.lines()
        self.reward = self._reward()
        self.yardstick = Yardstick(
            self.prompts, self.section.samples, recipe.rollout.max_new_tokens, reward=self.reward
        )

    @cached_property
    def key(self) -> str:
        """Of everything that decides the figures of a model: measured by the same key is measured
        alike.
        """
        section = self.section.model_dump(
            mode="json", exclude={"grid", "overrides", "seeds", "workers"}
        )
        used = [
            section,
            self.recipe.model_dump(mode="json", include={"model", "rewards", "rollout", "data"}),
        ]
        texts = [prompt.text for prompt in self.prompts]
        return sha256(
            json.dumps([used, self.base_name, texts], sort_keys=True).encode()
        ).hexdigest()[:16]

    @cached_property
    def listed(self) -> Listed | None:
        """The task's world, where its outcomes can be listed and nothing else than its own reward
        is asked for.
        """
        own = (
            self.task is not None
            and self.recipe.model.name_or_path == "task"
            and self.reward == self.task.reward
        )
        world = listed_world(self.recipe.data.train) if own else None
        return Listed(world, self.base_name) if world else None

    def base(self) -> dict[str, Any]:
        """Figures of the reference; where nothing can be listed also a larger pool of its samples,
        for the baselines.
        """
        pair = evaluation_pair(self._start(), self.reference)
        found: dict[str, Any] = {
            "key": self.key,
            "measured": self.yardstick.measure_reference(pair).dump(),
        }
        if self.listed is None and self.section.base_samples > self.section.samples:
            found["pool"] = self._pool(pair, self.section.base_samples)
        return found

    def run(self, point: Point, base: Measured) -> dict[str, Any]:
        """Figures of a finished run of the grid, as JSON."""
        pair = evaluation_pair(Path(point.recipe.output_dir) / "model", self.reference)
        found = self.yardstick.measure(pair, point.name, base=base)
        verdicts = wins(found, base, self._judge)
        assert verdicts is not None, "there is always a score here"
        probability, valid = verdicts
        result = {
            "key": self.key,
            "measured": found.dump(),
            "wins": probability.tolist(),
            "valid": valid.tolist(),
        }
        if self.listed is not None:
            result["exact"] = {
                name: values.tolist() for name, values in asdict(self.listed.figures(pair)).items()
            }
        margins = self._margins(point, pair)
        return result | ({} if margins is None else {"margins": margins})

    def _pool(self, pair: PolicyPair, count: int) -> dict[str, Any]:
        """Scores and log-probs of `count` samples of the reference per prompt, [P, count] each: the
        sampler knows the latter.
        """
        sampler = HFSampler(
            pair, max_new_tokens=self.yardstick.max_new_tokens, seed=self.yardstick.seed
        )
        ids = [prompt.ids for prompt in self.prompts]
        drawn = sampler.sample(ids, Draw(count, "reference"), step=0, prompt_ids=range(len(ids)))
        tokens = [[sample.ids for sample in row] for row in drawn]
        more = replace(self.yardstick, samples=count)
        scores = more.scores(decode_all(pair.tokenizer, tokens), tokens)
        assert scores is not None
        return {
            "score": scores.tolist(),
            "logp": [[float(sample.logps.double().sum()) for sample in row] for row in drawn],
        }

    def _start(self) -> str:
        """Where every run starts, and its KL is measured from."""
        adapter = self.recipe.model.adapter
        return adapter.path if adapter and adapter.path else self.base_name

    def _prompts(self) -> Any:
        source = self.section.prompts or self.recipe.data.eval
        if source is None and self.task is None:
            at = self.recipe.origin.at(("compare",))
            raise ConfigError(
                f"{at}: nothing says which prompts to evaluate on; set compare.prompts (or data.eval) to a file"
            )
        if source is None or source.startswith("task:"):
            assert self.task is not None
            return self.task.rows("rollout", "eval")
        return source

    def _reward(self) -> Any:
        asked = self.section.score or self.recipe.rewards
        if asked:
            return load_rewards(asked, safe=self.safe)
        if self.task is None:
            place = self.recipe.origin.at(("compare",))
            example = "compare.score.0.function=my_file.py:my_function"
            raise ConfigError(f"{place}: nothing says by which score to compare; set {example}")
        return self.task.reward

    @cached_property
    def _judge(self) -> Any:
        return load_judge(self.section.judge, safe=self.safe) if self.section.judge else None

    def _margins(self, point: Point, pair: PolicyPair) -> list[float] | None:
        """The objective's own implicit-reward margins of held-out pairs [N]; None where it learns
        from no pairs or has none.
        """
        source = self._held_out_pairs()
        if source is None:
            return None
        objective = build_objective(point.recipe.objective, safe=self.safe)
        margins = preference_margins(pair, source, point.recipe.data, objective=objective)
        return None if margins is None else margins.tolist()

    def _held_out_pairs(self) -> str | Sequence[Any] | None:
        source = self.recipe.data.eval
        if source is None or source.startswith("task:"):
            return self.task.rows("pair", "eval") if self.task else None
        return source
