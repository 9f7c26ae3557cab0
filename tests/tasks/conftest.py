"""The small world of reviews, made once and cached."""

import pytest

from alignkit.tasks import Task, resolve
from alignkit.tasks.reviews import WORLDS, World


@pytest.fixture(scope="session")
def small() -> World:
    return WORLDS["reviews_small"]


@pytest.fixture(scope="session")
def small_task() -> Task:
    return resolve("task:reviews_small")
