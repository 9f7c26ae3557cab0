"""The recipe's teacher in a run: loaded for the whole of it, or, where its most likely tokens are
stored, only while rows are scored that no store has.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from alignkit.batches import Bundle
from alignkit.config.model import check_source
from alignkit.config.recipe import Recipe
from alignkit.config.teacher import TeacherConfig
from alignkit.errors import ConfigError
from alignkit.policies.pair import PolicyPair
from alignkit.policies.reference import Anchor
from alignkit.policies.teacher import FIELD, add_teacher
from alignkit.policies.teacher_signature import stored_file
from alignkit.policies.teacher_store import release_teacher, with_stored_teacher
from alignkit.runs.context import RunContext
from alignkit.tasks import Task


def teacher_of(recipe: Recipe, task: Task | None) -> TeacherConfig:
    """The recipe's section, with the folder of the task's teacher where it says `task`."""
    teacher = recipe.teacher
    if teacher is None:
        raise ConfigError("this objective learns from a teacher; set teacher.name_or_path=MODEL")
    if task is not None and teacher.name_or_path == "task":
        return teacher.model_copy(update={"name_or_path": str(task.teacher_folder)})
    return teacher


def load_teacher(pair: PolicyPair, recipe: Recipe, task: Task | None) -> None:
    """Make the teacher an anchor of `pair`; without its weights, where the rows will hold what it
    says. ModelError.
    """
    teacher = teacher_of(recipe, task)
    if teacher.top is None:
        add_teacher(pair, teacher, recipe.model)
    else:
        pair.anchors["teacher"] = Anchor("stored")


def check_stored_teacher(context: RunContext) -> None:
    """ModelError, before any row is read, for a teacher that is nowhere: no store has laws of it, and
    there is no such model.
    """
    if not _is_stored(context):
        return
    teacher = teacher_of(context.recipe, context.task)
    if stored_file(context.pair, teacher) is None:
        check_source(teacher.name_or_path, FIELD)


@contextmanager
def asking_teacher(context: RunContext) -> Iterator[None]:
    """Inside the block `with_teacher` may load the teacher; at its end it is let go."""
    layout = context.pair.layout
    try:
        yield
    finally:
        if _is_stored(context):
            release_teacher(context.pair)
            context.pair.layout = layout  # rows need not suit the teacher any more


def with_teacher(context: RunContext, bundles: Sequence[Bundle]) -> Sequence[Bundle]:
    """The bundles with the teacher's most likely tokens, where the recipe asks for that. Every
    process scores all of them, unless a store has them.
    """
    if not _is_stored(context) or not bundles:
        return bundles
    teacher = teacher_of(context.recipe, context.task)
    return with_stored_teacher(context.pair, bundles, teacher, context.recipe.model)


def _is_stored(context: RunContext) -> bool:
    teacher = context.recipe.teacher
    return context.plan.needs_teacher and teacher is not None and teacher.top is not None
