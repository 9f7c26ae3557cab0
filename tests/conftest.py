"""Fixtures shared by all tests."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


def pytest_collection_finish():
    """Take what the imports made out of the garbage collector's sight. It stays until the end anyway,
    and accelerate collects before every training run, over millions of objects.
    """
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real test data beside the checkout; tests that use it skip where it is
    absent.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real test data (../shared/data) is not beside this checkout")
    return folder
