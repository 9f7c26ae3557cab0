"""Decoders beside the grid: `compare.decode`, expanded, measured and gathered. They need no training."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.comparison.grid import name_of, section_of
from alignkit.comparison.measurement import DamagedFileError, Measurement
from alignkit.comparison.run_pool import run_apart
from alignkit.comparison.single_run import LOG, measurer_of, printing_into
from alignkit.config.decode import DecodeConfig
from alignkit.config.recipe import Recipe
from alignkit.config.validation import validated
from alignkit.errors import ConfigError
from alignkit.files import sha256_of_json
from alignkit.metrics.frontier import Curve

if TYPE_CHECKING:
    from alignkit.comparison.measure_run import Measurer

FOLDER = "decoders"  # beside the runs


@dataclass(frozen=True)
class DecoderPoint:
    """One decoder: a point of a curve."""

    name: str  # of its file
    label: str  # its curve
    swept: Mapping[str, Any]  # its values of the fields in which the points of a curve differ
    config: DecodeConfig

    @property
    def setting(self) -> str:
        """The swept fields in words, such as "n=4"."""
        return ", ".join(f"{field}={value}" for field, value in self.swept.items())


def expand_decoders(recipe: Recipe) -> list[DecoderPoint]:
    """Every decoder of `compare.decode`, in the order written. ConfigError for a label that the grid
    has too, and for fields that do not fit, with their place.
    """
    section = section_of(recipe)
    points = []
    for label, fields in section.decode.items():
        keys = ("compare", "decode", label)
        if label in section.grid:
            raise ConfigError(
                f"{recipe.origin.at(keys)}: `{label}` is a label of the grid and of `decode`; give "
                "one of them another name"
            )

        # Rewards are a list by themselves; any other list is swept.
        lists = {
            name: value
            for name, value in fields.items()
            if isinstance(value, list) and name != "rewards"
        }
        for values in product(*lists.values()):
            swept = dict(zip(lists, values))
            config = validated(DecodeConfig, {**fields, **swept}, recipe.origin, keys)
            points.append(DecoderPoint(name_of(label, swept), label, swept, config))
    return points


def file_of(recipe: Recipe, point: DecoderPoint) -> Path:
    """Where the measurement of a decoder stands."""
    return Path(recipe.output_dir) / FOLDER / f"{point.name}.json"


def read_decoder(measurer: "Measurer", point: DecoderPoint) -> Measurement | None:
    """The measurement of a decoder; None where it is still to be made, or was of other settings."""
    try:
        return Measurement.read(file_of(measurer.recipe, point), _key(measurer, point))
    except DamagedFileError:
        return None


def measure_decoders(
    measurer: "Measurer", points: Sequence[DecoderPoint], processes: int = 0
) -> None:
    """Measure the decoders that are not measured yet, several at a time where there are
    `processes`, and write their files. Raises what `measure_decoder` raises.
    """
    waiting = [point for point in points if read_decoder(measurer, point) is None]
    if min(processes, len(waiting)) > 1:
        run_apart(
            waiting,
            partial(_measure_apart, recipe=measurer.recipe, safe=measurer.safe),
            min(processes, len(waiting)),
            crashed=lambda point, how: None,
            watch=lambda at_work: None,
        )

    # What another process could not measure is tried once more here, where its error is raised.
    for point in waiting:
        if read_decoder(measurer, point) is None:
            _measure(measurer, point)


def _measure_apart(point: DecoderPoint, *, recipe: Recipe, safe: bool) -> None:
    """Measure a decoder in one of several processes, if it can be: with one thread, printing into
    a log beside its file.
    """
    import torch

    torch.set_num_threads(1)
    with printing_into(file_of(recipe, point).parent / LOG), suppress(Exception):
        _measure(measurer_of(recipe, safe), point)


def _measure(measurer: "Measurer", point: DecoderPoint) -> None:
    from alignkit.evaluation.decoded import listed_law, measure_decoder

    config = point.config
    exact = None
    if config.model == "task":
        config = config.model_copy(update={"model": measurer.start})
        exact = None if measurer.listed is None else listed_law(config, measurer.listed)
    measured = measure_decoder(
        config, measurer.yardstick, measurer.reference, point.name, safe=measurer.safe
    )

    file = file_of(measurer.recipe, point)
    file.parent.mkdir(parents=True, exist_ok=True)
    Measurement(_key(measurer, point), measured, exact=exact).write(file)


def _key(measurer: "Measurer", point: DecoderPoint) -> str:
    return sha256_of_json([measurer.key, point.config.model_dump(mode="json")])[:16]


def decoder_curves(measurer: "Measurer", points: Sequence[DecoderPoint]) -> list[Curve]:
    """One curve for each label, of exact means per prompt where the decoder's law can be listed and
    of samples elsewhere. Where the KL is an interval it is the upper end.
    """
    curves = []
    for label in dict.fromkeys(point.label for point in points):
        own = [point for point in points if point.label == label]
        rows = []
        for point in own:
            measurement = read_decoder(measurer, point)
            assert measurement is not None, "decoders are measured before they are gathered"
            means = measurement.exact or measurement.measured.per_prompt()
            rows.append((means["kl"], means["score"]))
        kl, score = (np.array(values)[:, None] for values in zip(*rows))
        curves.append(Curve(label, tuple(point.setting for point in own), kl, score))
    return curves


def decoder_rows(measurer: "Measurer", points: Sequence[DecoderPoint]) -> list[dict[str, Any]]:
    """Each decoder as JSON: its section, KL (`kl_low` where it is an interval), score and price."""
    rows = []
    for point in points:
        measurement = read_decoder(measurer, point)
        assert measurement is not None, "decoders are measured before they are gathered"
        means = {
            name: float(np.nanmean(values))
            for name, values in measurement.measured.per_prompt().items()
        }
        exact = measurement.exact or {}
        rows.append(
            {
                "name": point.name,
                "label": point.label,
                "setting": point.setting,
                "decode": point.config.model_dump(mode="json", exclude_defaults=True),
                "exact": {name: float(np.mean(values)) for name, values in exact.items()},
                "kl_low": None if exact else means.get("kl_low"),
                **{name: means[name] for name in ("kl", "score", "sampled", "reward_calls")},
            }
        )
    return rows
