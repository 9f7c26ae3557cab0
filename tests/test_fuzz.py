"""Anything that a recipe or a row may hold is understood or refused in words: kept corpus, and
hypothesis over every field.
"""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import save_model

from alignkit.config import Recipe, build_objective, load_recipe
from alignkit.config.model import ModelConfig
from alignkit.config.validation import field_names
from alignkit.data import DataConfig, load_bundles
from alignkit.errors import AlignkitError
from alignkit.objectives import OBJECTIVES
from alignkit.objectives.base import Objective
from alignkit.policies.tokenizer import load_tokenizer

# each file once broke something here or elsewhere, or might
CORPUS = Path(__file__).with_name("corpus")
USABLE = {"bom.yaml", "binary_words.yaml", "date.yaml", "empty.yaml", "hexadecimal.yaml"}


def attempt(call):
    """What `call` returns and None, or None and the AlignkitError it raises; any other exception
    fails the test.
    """
    try:
        return call(), None
    except AlignkitError as error:
        return None, error


def read(file, overrides=(), **options):
    recipe = load_recipe(file, overrides)
    return build_objective(recipe.objective, recipe.origin, **options)


@pytest.mark.parametrize("name", sorted(p.name for p in (CORPUS / "recipes").iterdir()))
def test_recipes_of_the_corpus(name):
    file = CORPUS / "recipes" / name
    _, refusal = attempt(lambda: read(file))
    assert (refusal is None) == (name in USABLE), refusal
    assert refusal is None or (refusal.exit_code == 2 and str(refusal).startswith(str(file)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(
        ModelConfig(name_or_path=str(save_model(tmp_path_factory.mktemp("model"))))
    )


@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize("name", sorted(p.name for p in (CORPUS / "rows").iterdir()))
def test_rows_of_the_corpus(tokenizer, name, policy):
    config = DataConfig(train=str(CORPUS / "rows" / name), on_bad_row=policy)
    found, refusal = attempt(lambda: load_bundles(config, "pair", tokenizer))
    if refusal:
        assert (refusal.exit_code in (3, 4), name in str(refusal)) == (True, True), refusal
    else:
        assert len(found[0]) == found[1].usable > 0


SCALARS = [
    "0",
    "-1",
    "1",
    "3",
    "0.5",
    "1e400",
    "-0.0",
    ".nan",
    ".inf",
    "true",
    "null",
    "''",
    "auto",
    "task",
    "~",
    "1" * 30,
    "0x1F",
]
VALUES = st.sampled_from(SCALARS) | st.sampled_from(
    ["[]", "{}", "[1, 2]", "{a: 1}", "[[]]", "'a:b'", "[null]", "{name: dpo}"]
)
FIELDS = st.sampled_from(
    [
        *field_names(Recipe),
        "objective.beta",
        "objective.name",
        "objective.0.weight",
        "rewards.0.function",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.builds("{}={}".format, FIELDS, VALUES), min_size=1, max_size=3))
def test_any_value_of_any_field_is_taken_or_refused_in_words(overrides):
    objective, refusal = attempt(lambda: read("dpo", overrides, safe=True))
    assert isinstance(objective, Objective) or refusal.exit_code == 2
    assert not refusal or all(
        re.match(r"override |\S+/dpo\.yaml", line) for line in str(refusal).splitlines()
    ), refusal


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(OBJECTIVES)), st.data())
def test_any_hyper_parameter_is_taken_or_refused_in_words(name, data):
    fields = list(type(build_objective({"name": name})).model_fields) or ["none"]
    values = st.sampled_from(
        [0, -1, 1, 0.5, 1e308, float("nan"), float("inf"), None, "", "kl", True, [], {}]
    )
    section = {"name": name, data.draw(st.sampled_from(fields)): data.draw(values)}
    objective, refusal = attempt(lambda: build_objective(section))
    assert isinstance(objective, Objective) or (
        refusal.exit_code == 2 and "`objective" in str(refusal)
    )
