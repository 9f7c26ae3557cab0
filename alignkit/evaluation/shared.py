"""What is the same for every model of one `alignkit eval`: reference, prompts, reward, judge."""

from dataclasses import dataclass
from typing import Any

from alignkit.config.recipe import Recipe
from alignkit.config.rollout import MAX_NEW_TOKENS, RolloutConfig
from alignkit.data.load import load_prompts
from alignkit.data.prompts import Prompt
from alignkit.data.read import Source, held_out
from alignkit.errors import ConfigError
from alignkit.evaluation.episodes import World
from alignkit.evaluation.exact import Listed, listed_reviews
from alignkit.evaluation.measure import Yardstick, evaluation_pair
from alignkit.evaluation.measurements import Measured
from alignkit.evaluation.request import Request, data_of, task_of
from alignkit.judges.load import load_judge
from alignkit.policies.module import context_length
from alignkit.rewards.call import RewardCall
from alignkit.rewards.load import load_rewards
from alignkit.rollout.generate import OneModel
from alignkit.runs.agents import open_environments
from alignkit.runs.trained_model import find_finished, load_finished
from alignkit.tasks import Task


@dataclass(frozen=True)
class Shared:
    """What is the same for every model that is measured."""

    request: Request
    task: Task | None
    reference: OneModel
    yardstick: Yardstick
    base: Measured  # the reference, measured
    listed: Listed | None
    judge: Any  # says which completion wins; None: the higher score does


def shared_of(request: Request) -> Shared:
    """Load what every model of a checked request is measured by and against."""
    assert request.reference is not None  # `checked` found it
    task = task_of(request)
    reference = load_finished(request.reference)
    pair = evaluation_pair(request.reference, reference)
    yardstick = _yardstick(request, task, reference)
    listed = _listed(request, task, yardstick)
    judge = _judge(request, task)
    base = yardstick.measure_reference(pair)
    return Shared(request, task, reference, yardstick, base, listed, judge)


def first_recipe(request: Request) -> Recipe | None:
    """The recipe of the first run among the models: it says what the request leaves open."""
    return next(iter(request.recipes.values()), None)


def _yardstick(request: Request, task: Task | None, reference: OneModel) -> Yardstick:
    recipe = first_recipe(request)
    prompts = _prompts(request, task, reference, recipe)

    reward: RewardCall | None
    if request.reward is not None:
        reward = load_rewards([{"function": request.reward}], safe=request.safe)
    elif recipe is not None and recipe.rewards:
        time = recipe.data.template_time
        reward = load_rewards(recipe.rewards, safe=request.safe, template_time=time)
    else:
        reward = task.reward if task else None

    longest = max(len(prompt.ids) for prompt in prompts)
    room = context_length(reference.network) - longest
    usual = recipe.rollout.max_new_tokens if recipe else MAX_NEW_TOKENS
    max_new_tokens = request.max_new_tokens or min(room, usual)
    world = _world(request, task, recipe)
    return Yardstick(prompts, request.samples, max_new_tokens, request.seed, reward, world)


def _world(request: Request, task: Task | None, recipe: Recipe | None) -> World | None:
    """What the models act in, as the first run's recipe or the task says; None where they give single
    answers. ConfigError for what is not known of episodes.
    """
    rollout = recipe.rollout if recipe else RolloutConfig()
    if request.safe and rollout.takes_turns:
        raise ConfigError(
            "the run's `rollout.environment` or `rollout.tools` would run code that its recipe "
            "names, and --safe forbids it"
        )
    environments = open_environments(rollout, task)
    if environments is None:
        return None
    asked = {
        "a decoder": bool(request.decoders),
        "--credit": request.credit,
        "--distance": request.distance is not None,
    }
    if given := [name for name, is_given in asked.items() if is_given]:
        raise ConfigError(
            f"{' and '.join(given)} can be measured of single answers alone, and the models act in "
            "an environment over several turns; leave it out"
        )
    return World(environments, rollout.turns, data_of(recipe, given=False))


def _prompts(
    request: Request, task: Task | None, reference: OneModel, recipe: Recipe | None
) -> list[Prompt]:
    """The request's prompts, else the held-out rows of the run or of the task."""
    source: Source | None = request.prompts or (held_out(recipe.data) if recipe else None)
    if source is None and task is not None:
        source = f"task:{task.name}"
    if source is None:
        raise ConfigError(
            "nothing says which prompts to measure on; give --prompts FILE (rows with `prompt`) "
            "or task:NAME"
        )
    if str(source).startswith("task:"):
        assert task is not None
        source = task.rows("rollout", "eval")

    data = data_of(recipe, given=request.prompts is not None)
    prompts, _ = load_prompts(data, reference.tokenizer, source=source)
    return prompts


def _judge(request: Request, task: Task | None) -> Any:
    """Who says which completion wins: the runs' judge, else their task's; None: the score."""
    recipe = first_recipe(request)
    if recipe is not None and recipe.judge is not None:
        time = recipe.data.template_time
        return load_judge(recipe.judge, safe=request.safe, template_time=time)
    return task.judge if task else None


def _listed(request: Request, task: Task | None, yardstick: Yardstick) -> Listed | None:
    """Exact results, where the reference is a task's model, the score its own reward, and its
    outcomes can be listed.
    """
    assert request.reference is not None
    if task is None or yardstick.reward != task.reward:
        return None
    if find_finished(request.reference) != task.model_folder:
        return None
    reviews = listed_reviews(task.name)
    return Listed(reviews, task.model_folder) if reviews else None
