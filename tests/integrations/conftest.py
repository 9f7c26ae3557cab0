"""Fixtures of the tests with TRL."""

import pytest
from trl_world import save_models


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny Llama's folder; a LoRA adapter that does something is in its `adapter`."""
    return save_models(tmp_path_factory.mktemp("model"))
