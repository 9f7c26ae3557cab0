"""The small world of reviews, made once and cached."""

import pytest

from alignkit.tasks import Task, resolve
from alignkit.tasks.reviews import REVIEWS, Reviews


@pytest.fixture(scope="session")
def small() -> Reviews:
    return REVIEWS["reviews_small"]


@pytest.fixture(scope="session")
def small_task() -> Task:
    return resolve("task:reviews_small")
