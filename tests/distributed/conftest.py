"""Fixtures of the tests with several processes."""

import pytest
from world import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Llama."""
    return save_model(tmp_path_factory.mktemp("model"))
