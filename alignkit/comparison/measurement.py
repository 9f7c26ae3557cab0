"""The measurement of one model, and the file that holds it: `base.json` for the base model and
`runs/NAME/measured.json` for every run.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.evaluation.measurements import BoolArray, Measured
from alignkit.files import sha256_of_json, write_json, writing
from alignkit.metrics.intervals import Array

BASE_FILE = "base.json"
RUN_FILE = "measured.json"


class DamagedFileError(Exception):
    """A file of a measurement that cannot be used, with the reason."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model on P prompts with K completions of each.

    Only a run has wins, exact figures and margins; only the base model has a pool.
    """

    key: str  # of the prompts, score and judge it was measured by: `Measurer.key`
    measured: Measured
    wins: Array | None = None  # [P, K] probability that the run's completion beats the base's
    valid: BoolArray | None = None  # [P, K] whether the judge's verdict can be used
    exact: Mapping[str, Array] | None = None  # name -> [P], where all outcomes can be listed
    margins: Array | None = None  # [N] implicit-reward margins of held-out pairs
    pool: Mapping[str, Array] | None = None  # score and logp [P, n] of more samples, for baselines

    def write(self, file: Path) -> None:
        """Write it as JSON with its SHA-256; numbers that JSON does not have (nan) become null.
        ResourceError where the disk refuses.
        """
        content = {"key": self.key, "measured": self.measured.dump()}
        for name in ("wins", "valid", "exact", "margins", "pool"):
            value = getattr(self, name)
            if value is not None:
                content[name] = value
        content = as_json(content)
        with writing(file):
            write_json(file, {**content, "sha256": sha256_of_json(content)}, indent=None)

    @classmethod
    def read(cls, file: Path, key: str) -> "Measurement | None":
        """The measurement in `file`; None where there is none, or one by another `key`.

        DamagedFileError for a file that is not as `write` left it.
        """
        content = _content(file)
        if content is None or content.get("key") != key:
            return None

        # Files of earlier versions have no hash.
        sha256 = content.pop("sha256", None)
        if sha256 is not None and sha256 != sha256_of_json(content):
            raise DamagedFileError("it does not match its own SHA-256")
        try:
            return cls._of(key, content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFileError(f"a part of it is missing or wrong: {error}") from error

    @classmethod
    def _of(cls, key: str, content: Mapping[str, Any]) -> "Measurement":
        return cls(
            key=key,
            measured=Measured.load(content["measured"]),
            wins=_array(content.get("wins")),
            valid=_array(content.get("valid"), bool),
            exact=_arrays(content.get("exact")),
            margins=_array(content.get("margins")),
            pool=_arrays(content.get("pool")),
        )


def _content(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file. DamagedFileError for anything else."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFileError(error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFileError("it holds no JSON object")
    return content


def as_json(value: Any) -> Any:
    """`value` with arrays as lists, and null for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _array(values: Any, dtype: type = float) -> Any:
    return None if values is None else np.array(values, dtype=dtype)


def _arrays(values: Mapping[str, Any] | None) -> dict[str, Array] | None:
    return None if values is None else {name: _array(inner) for name, inner in values.items()}
