"""The file of a measurement: what is written is read again, and so are files written before."""

import json

import numpy as np

from alignkit.comparison.measurement import Measurement, as_json
from alignkit.evaluation.measurements import Measured

MEASURED = Measured(
    name="m",
    prompts=["p"],
    texts=[["a", "b"]],
    tokens=[[[1], [2, 3]]],
    ended=np.ones((1, 2)),
    score=np.array([[0.5, np.nan]]),
    kl=np.full((1, 2), 0.1),
    logp=np.full((1, 2), -2.0),
    reference_logp=np.full((1, 2), -2.1),
    entropy=np.ones((1, 2)),
)


def test_what_is_written_is_read_again(tmp_path):
    file = tmp_path / "measured.json"
    written = Measurement(
        "key",
        MEASURED,
        wins=np.array([[0.5, 1.0]]),
        valid=np.array([[True, False]]),
        exact={"kl": np.array([0.2])},
        margins=np.array([0.1, -0.3]),
    )
    written.write(file)
    assert "NaN" not in file.read_text()  # JSON has none
    read = Measurement.read(file, "key")
    assert read.measured.texts == MEASURED.texts
    np.testing.assert_array_equal(read.measured.score, MEASURED.score)
    np.testing.assert_array_equal(read.wins, written.wins)
    assert read.valid.tolist() == [[True, False]]
    assert read.exact["kl"].tolist() == [0.2]
    assert read.margins.tolist() == [0.1, -0.3]
    assert read.pool is None


def test_another_key_and_no_file_are_no_measurement(tmp_path):
    file = tmp_path / "base.json"
    assert Measurement.read(file, "key") is None
    Measurement("old", MEASURED).write(file)
    assert Measurement.read(file, "key") is None


def test_a_base_file_with_nan_as_python_writes_it_is_read(tmp_path):
    """Files of earlier versions hold NaN in the pool of samples."""
    file = tmp_path / "base.json"
    pool = {"score": [[float("nan"), 1.0]], "logp": [[-1.0, -2.0]]}
    file.write_text(json.dumps({"key": "key", "measured": MEASURED.dump(), "pool": pool}))
    read = Measurement.read(file, "key")
    np.testing.assert_array_equal(read.pool["score"], [[np.nan, 1.0]])


def test_arrays_and_nan_become_lists_and_null():
    value = {"a": np.array([1.0, np.nan]), "b": (np.float64(2), float("inf")), "c": np.int64(3)}
    assert as_json(value) == {"a": [1.0, None], "b": [2.0, None], "c": 3}
