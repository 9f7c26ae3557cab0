"""Where the inputs lie on which something once went wrong."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases() -> Path:
    """The folder with the inputs; tests that use it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip("the inputs (../shared/cases) are not beside this checkout")
    return folder
