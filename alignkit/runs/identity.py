"""What a run is made from besides its recipe and its rows: the weights and the code that the recipe
names. Their hashes are part of the run's identity, so that replaced files are noticed.
"""

from collections.abc import Iterator, Mapping

from accelerate.utils import broadcast_object_list

from alignkit.config.code_hash import code_hash
from alignkit.config.objective import parts_of
from alignkit.config.recipe import REFERENCES
from alignkit.config.rewards import RewardConfig
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.policies.teacher_signature import weights_of
from alignkit.policies.weights import weights_hash
from alignkit.runs.context import RunContext
from alignkit.runs.live import LiveTask
from alignkit.runs.streams import contexts_of
from alignkit.runs.teacher import teacher_of

Hashes = Mapping[str, str]  # field of the recipe -> SHA-256 of what it names


def hashes_of_inputs(context: RunContext) -> dict[str, Hashes]:
    """The hashes of all `weights` and of all `code` that the run uses. The first process reads the
    files, the others get its answer.
    """
    hashes: dict[str, Hashes] = {}
    with raise_on_all_ranks(context.accelerator):
        if context.accelerator.is_main_process:
            parts = contexts_of(context)
            models = {field: model for part in parts for field, model in _models(part)}
            weights = {field: weights_hash(*model) for field, model in models.items()}
            if context.recipe.teacher is not None and context.plan.needs_teacher:
                teacher = teacher_of(context.recipe, context.task)
                weights["teacher"] = weights_of(context.pair, teacher)
            hashes = {
                "weights": weights,
                "code": {
                    field: code_hash(spec)
                    for pairs in (_objectives(context), *map(_code, parts))
                    for field, spec in pairs
                },
            }
    return broadcast_object_list([hashes])[0]


def _models(context: RunContext) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Field -> path or hub name, and revision, of each model that the run loads but the teacher."""
    task = context.task
    model = context.recipe.model
    base = model.name_or_path
    if task is not None and base == "task":
        base = str(task.model_folder)
    if not (isinstance(task, LiveTask) and task.model is not None):
        yield "model", (base, model.revision)

    if model.adapter is not None and model.adapter.path is not None:
        yield "adapter", (model.adapter.path, None)
    reference = context.recipe.reference.kind
    if reference not in REFERENCES and "reference" in context.pair.anchors:
        yield "reference", (reference, None)

    for field, reward in _rewards(context):
        if reward.model is not None:
            yield f"{field}.model", (reward.model, reward.revision)
        for number, member in enumerate(reward.ensemble or ()):
            yield f"{field}.ensemble.{number}", (member, None)
        if reward.rewriter is not None:
            yield f"{field}.rewriter", (reward.rewriter, reward.revision)
    judge = context.recipe.judge
    if _asks_judge(context) and judge is not None and judge.model is not None:
        yield "judge.model", (judge.model, None)


def _objectives(context: RunContext) -> Iterator[tuple[str, str]]:
    """Field -> code of all objectives of the user's own."""
    for section_keys, section in context.recipe.objectives():
        for keys, part in parts_of(section, section_keys):
            if "import" in part:
                yield ".".join((*keys, "import")), part["import"]


def _code(context: RunContext) -> Iterator[tuple[str, str]]:
    """Field -> `module:name` or `file.py:name` of all other code of the user's own that is called."""
    for field, reward in _rewards(context):
        if reward.function is not None:
            yield f"{field}.function", reward.function
        if reward.verifier is not None:
            yield f"{field}.verifier", reward.verifier

    rollout = context.recipe.rollout
    if context.plan.data == "rollout" and rollout.environment is not None:
        yield "rollout.environment", rollout.environment
    if context.plan.data == "rollout":
        for number, tool in enumerate(rollout.tools):
            yield f"rollout.tools.{number}", tool

    judge = context.recipe.judge
    if _asks_judge(context) and judge is not None:
        if judge.function is not None:
            yield "judge.function", judge.function
        if judge.trl is not None:
            yield "judge.trl", judge.trl


def _rewards(context: RunContext) -> Iterator[tuple[str, RewardConfig]]:
    """The rewards that the objective learns from, by itself or through its judge."""
    judge = context.recipe.judge
    if context.plan.feedback == "reward":
        for number, reward in enumerate(context.recipe.rewards):
            yield f"rewards.{number}", reward
    elif _asks_judge(context) and judge is not None:
        for number, reward in enumerate(judge.rewards or []):
            yield f"judge.rewards.{number}", reward


def _asks_judge(context: RunContext) -> bool:
    return context.plan.feedback not in ("none", "reward")
