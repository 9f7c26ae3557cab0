"""The `decode` section: every fault is one sentence with its place, before torch is imported."""

import subprocess
import sys

import pytest

from alignkit.config.decode import DecodeConfig, load_decode
from alignkit.errors import ConfigError

BAD = {
    "decode: {method: smc, particles: 4, beta: 0}": "`decode.beta` is 0; it should be greater than 0",
    "decode: {method: smc, particles: 4}": "method smc needs `beta`",
    "decode: {method: best_of, n: 4, beta: 0.1}": "method best_of does not use `beta`",
    "decode: {method: beam}": '`decode.method` is "beam"',
    "decode: {method: fuse}": "method fuse needs `weights`",
    "decode: {method: smc, particles: 4, beta: 1, proposal: twist}": "needs a learned value",
    "decode: {method: smc, particles: 4, beta: 1, twist_beta: 2}": "twist_beta goes with twist: reward",
    "decode: {method: sample, temprature: 1}": "Did you mean `temperature`",
    "decode: {method: reject, beta: .nan, bound: 1}": "`decode.beta`",
    "model: {dtype: auto}": "has a `decode` section",
    "decode: {method: sample}\ntrain: {steps: 3}": "`train`",
}


@pytest.mark.parametrize("text", BAD)
def test_faults_are_named_with_their_place(text, tmp_path):
    file = tmp_path / "decode.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"decode\.yaml") as caught:
        load_decode(file)
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_default_that_is_written_out_is_no_fault():
    config = DecodeConfig(method="sample", ess=0.5, every=8)
    assert config.temperature == 1.0


def test_reading_one_imports_no_torch():
    code = (
        "import sys; from alignkit.config.decode import DecodeConfig; "
        "DecodeConfig(method='sample'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
