import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alignkit.config
from alignkit.config import (
    Recipe,
    build_objective,
    dump_recipe,
    load_recipe,
    shipped_recipes,
)
from alignkit.config.text import parse_recipe
from alignkit.errors import ConfigError
from alignkit.objectives import OBJECTIVES

RECIPE = """\
model: {name_or_path: task}
data: {train: "task:reviews"}
objective:
  name: dpo
  beta: 0.1
train:
  steps: 5
  learning_rate: 5e-4
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.yaml"):
        Path(name).write_text(text)
        return name

    return write


def refusal(*args):
    with pytest.raises(ConfigError) as caught:
        load_recipe(*args)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_recipe_is_read_with_yaml_1_2_numbers_and_defaults(write):
    recipe = load_recipe(write(RECIPE))
    assert recipe.train.learning_rate == 5e-4
    assert recipe.train.steps == 5
    assert recipe.objective == {"name": "dpo", "beta": 0.1}
    assert recipe.output_dir == "runs/mine"
    assert recipe.train.model_copy(update={"steps": 300}) == Recipe().train


def test_overrides_reach_every_kind_of_field(write):
    recipe = load_recipe(
        write(RECIPE),
        [
            "objective=[{name: dpo}, {name: sft}]",
            "objective.0.weight=2",
            "objective.1.weight=0.1",
            "model.adapter.r=8",  # makes the section
            "rewards.0.function=my_rewards:score",  # makes the list
            "data.train=../pairs=1.jsonl",  # only the first = splits
            "train.adam_betas=[0.9, 0.99]",
            "train.seed=3",
            "rollout.max_new_tokens=${train.seed}",
            "train.seed=4",  # the last one counts
            "target={kind: ema}",
        ],
    )
    assert recipe.objective == [{"name": "dpo", "weight": 2}, {"name": "sft", "weight": 0.1}]
    assert recipe.model.adapter.r == 8
    assert [reward.function for reward in recipe.rewards] == ["my_rewards:score"]
    assert recipe.data.train == "../pairs=1.jsonl"
    assert recipe.train.adam_betas == (0.9, 0.99)
    assert (recipe.train.seed, recipe.rollout.max_new_tokens) == (4, 4)
    assert recipe.target.kind == "ema"
    assert [
        (part.beta if hasattr(part, "beta") else None, w)
        for part, w in build_objective(recipe.objective).parts
    ] == [
        (0.1, 2.0),
        (None, 0.1),
    ]


def test_an_override_replaces_a_section(write):
    assert load_recipe(write(RECIPE), ["objective={name: ipo, tau: 0.2}"]).objective == {
        "name": "ipo",
        "tau": 0.2,
    }


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "  steps: 5",
            "  step: 5",
            7,
            "`train.step` is not a field of `train`. Did you mean `steps`? Allowed: steps, epochs,",
        ),
        (
            "0.1\ntrain:",
            "0.1\ntrian:",
            6,
            "`trian` is not a section of a recipe. Did you mean `train`? Allowed: model, reference,",
        ),
        ("train:\n", "seed: 3\ntrain:\n", 6, "Did you mean `train.seed`?"),
        ("train:\n", "beta: 3\ntrain:\n", 6, "Did you mean `objective.beta`?"),
        ("steps: 5", "steps: 0", 7, "`train.steps` is 0; it should be greater than 0"),
        ("steps: 5", "steps: ten", 7, '`train.steps` is "ten"; it should be a whole number'),
        ("steps: 5", "steps: '5'", 7, '`train.steps` is "5"; it should be a whole number'),
        ("steps: 5", "steps: true", 7, "`train.steps` is true; it should be a whole number"),
        ("steps: 5", "steps: null", 7, "`train.steps` and `train.epochs` are both null; give one"),
        ("steps: 5", "micro_batch_tokens: -3", 7, "it should be 'auto' or greater than 0"),
        ("steps: 5", "steps: 5\n  steps: 6", 8, "duplicate key"),
        ("steps: 5", "steps: [5", 8, "not valid YAML"),
        (
            "steps: 5",
            "steps: !!python/object/apply:os.getcwd []",
            7,
            "the tag `tag:yaml.org,2002:python/object/apply:os.getcwd`",
        ),
        ("steps: 5", "steps: !!int 5", 7, "the tag"),
        ("steps: 5", "metric: ${oc.env:HOME}", 7, "calls a function"),
        ("steps: 5", "metric: ${train.nothing}", 7, "'train.nothing' not found"),
        ("5e-4", ".nan", 8, "`train.learning_rate` is NaN; it should be a finite number"),
        ("5e-4", ".inf", 8, "it should be a finite number"),
        ("5e-4", "-1", 8, "it should be greater than 0"),
        ("learning_rate: 5e-4", "schedule: cosin", 8, "Did you mean `cosine`?"),
        ("{name_or_path: task}", "", 1, "`model` is null; it should be a mapping of fields"),
        (
            "{name_or_path: task}",
            "{adapter: {rank: 3}}",
            1,
            "`model.adapter.rank` is not a field of `model.adapter`",
        ),
        (
            "{name_or_path: task}",
            "{name_or_path: 3}",
            1,
            "`model.name_or_path` is 3; it should be text",
        ),
        ("name: dpo", "name: dp", 4, "there is no objective `dp`. Did you mean `dpo`?"),
        ("name: dpo", "nam: dpo", 3, "should have one of `name` and `import`; it has neither"),
        ("name: dpo", "name: [dpo]", 4, "`objective.name` is ['dpo']; it should be text"),
        ("objective:\n  name: dpo\n  beta: 0.1\n", "objective: []\n", 3, "not empty"),
        (
            "model: {name_or_path: task}",
            "reference: {kind: forzen}",
            1,
            "neither a kind nor a path. Did you mean `frozen`?",
        ),
        (
            "model: {name_or_path: task}",
            "trackers: [wandbb]",
            1,
            "`trackers.0` is \"wandbb\"; it should be 'all',",
        ),
        ("model: {name_or_path: task}", "output_dir: ../elsewhere", 1, "outside"),
        ("model: {name_or_path: task}", "output_dir: runs/../../elsewhere", 1, "outside"),
    ],
)
def test_a_fault_is_told_with_its_line(write, old, new, line, words):
    assert old in RECIPE
    message = refusal(write(RECIPE.replace(old, new, 1)))
    assert message.startswith(f"mine.yaml:{line}: ")
    assert words in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=5", "`train.step` is not a field of `train`. Did you mean `steps`?"),
        ("beta=0.2", "Did you mean `objective.beta`?"),
        ("data.max_length=1", "greater than or equal to 2"),
        ("data.max_length=0", "greater than or equal to 2"),
        ("data.max_length=-5", "greater than or equal to 2"),
        ("rollout.completions=1", "greater than or equal to 2"),
        ("rollout.temperature=0", "greater than 0"),
        ("rollout.top_p=0", "greater than 0"),
        ("rollout.max_new_tokens=0", "greater than 0"),
        ("train.batch_size=0", "greater than 0"),
        ("train.metric_goal=less", "'auto', 'min' or 'max'"),
        ("objective.name=klppo", "there is no objective `klppo`"),
        ("train.steps", "write it as section.field=value"),
        ("=5", "write it as section.field=value"),
        ("train..steps=5", "write it as section.field=value"),
        ("train.steps.x=5", "`train.steps` is 5, which has no fields"),
        ("train.steps=[", "not valid YAML"),
        ("data.train=", "`data.train` is null; it should be text (quote it)."),
        ("data.eval={near: null}", "`data.eval.near` is null; it should be text (quote it)."),
        ("train.adam_betas=[]", "`train.adam_betas` is []; it should be a list with more values"),
        (
            "train.adam_betas=[0.9]",
            "`train.adam_betas` is [0.9]; it should be a list with more values",
        ),
        ("train.metric=*a", "not valid YAML"),
        ("train={seed: 1, seed: 2}", "duplicate key"),
        ("train.metric=!!str x", "the tag"),
        ("train.metric=${oc.env:HOME}", "calls a function"),
    ],
)
def test_a_fault_in_an_override_names_the_override(write, override, words):
    message = refusal(write(RECIPE), [override])
    assert message.startswith(f"override `{override}`: ")
    assert words in message


def test_a_list_takes_indices(write):
    file = write(RECIPE)
    assert "`objective` is a list; `3` should be an index up to 1" in refusal(
        file, ["objective=[{name: dpo}]", "objective.3.weight=1"]
    )
    assert "`objective` is a list; `x` should be an index up to 1" in refusal(
        file, ["objective=[{name: dpo}]", "objective.x=1"]
    )


def test_all_faults_are_told_at_once(write):
    message = refusal(
        write(RECIPE.replace("steps: 5", "stepz: 5\n  seed: -1")), ["data.max_length=x"]
    )
    assert [line.partition(": ")[0] for line in message.splitlines()] == [
        "override `data.max_length=x`",
        "mine.yaml:8",
        "mine.yaml:7",
    ]


def objective_refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        built(overrides)
    return str(caught.value)


def built(overrides):
    recipe = load_recipe("dpo", overrides)
    return build_objective(recipe.objective, recipe.origin)  # knows what needs the classes


def test_a_metric_whose_direction_is_not_known_needs_a_goal(write):
    message = refusal(write(RECIPE), ["train.metric=eval_kl"])
    assert "less or more of metric `eval_kl` is better; set train.metric_goal" in message
    goal = "train.metric_goal=min"
    assert load_recipe(write(RECIPE), ["train.metric=eval_kl", goal]).train.metric == "eval_kl"


@pytest.mark.parametrize(
    "beta", ["0", "-1", ".nan", ".inf", "-.inf", "'0.1'", "null", "[1]", "true"]
)
def test_a_beta_that_means_nothing_is_refused(beta):
    message = objective_refusal(f"objective.beta={beta}")
    assert message.startswith(f"override `objective.beta={beta}`: `objective.beta` is ")
    assert "greater than 0" in message or "finite number" in message or "a number" in message


def test_fields_of_the_objective_are_checked_where_they_stand(write):
    assert (
        "`objective.btea` is not a field of `objective`. Did you mean `beta`? Allowed: weighting, beta, label_smoothing"
        in objective_refusal("objective.btea=1")
    )
    message = refusal(write("objective:\n- {name: dpo}\n- name: sft\n  weight: 0\n"))
    assert message.startswith("mine.yaml:4: `objective.1.weight` is 0; it should be greater than 0")


def test_an_unknown_divergence_is_refused_with_the_nearest():
    message = objective_refusal("objective={name: fdpo, divergence: forward_kll}")
    assert (
        "unknown divergence 'forward_kll'; did you mean 'forward_kl'? allowed: reverse_kl, forward_kl,"
        in message
    )


def test_an_objective_of_ones_own(write):
    write("from alignkit import DPO\n\nclass Mine(DPO):\n    gamma: float = 1.0\n", "my_losses.py")
    for spec in ("my_losses.py:Mine", "my_losses:Mine"):
        recipe = load_recipe(write(f"objective: {{import: '{spec}', gamma: 2.0, beta: 0.3}}\n"))
        objective = build_objective(recipe.objective, recipe.origin)
        assert (type(objective).__name__, objective.gamma, objective.beta) == ("Mine", 2.0, 0.3)
        with pytest.raises(ConfigError, match="--safe"):
            build_objective(recipe.objective, recipe.origin, safe=True)
    with pytest.raises(
        ConfigError, match=r"mine\.yaml:1: objective\.import: json:dumps is not a subclass"
    ):
        build_objective(
            {"import": "json:dumps"}, load_recipe(write("objective: {import: 'json:dumps'}")).origin
        )


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_built_with_its_defaults(name):
    assert build_objective({"name": name}).plan.data


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_whole(name):
    recipe = load_recipe(name)
    assert recipe.output_dir == f"runs/{name}"
    assert build_objective(recipe.objective, recipe.origin).plan.data
    lines = shipped_recipes()[name].read_text().splitlines()
    assert len(lines) <= 40, "a recipe is a page"
    assert lines[0].startswith("#"), "the first comment says what it is"


def test_unknown_recipes(write):
    assert "Did you mean `dpo`? Shipped: " in refusal("dppo")
    assert refusal("no/such.yaml") == "there is no recipe file no/such.yaml"
    assert "a recipe is a mapping" in refusal(write("- 1\n- 2\n"))
    assert "cannot start with a dot" in refusal(write(RECIPE, "...yaml"))
    Path("latin.yaml").write_bytes(b"model: \xff\n")
    assert "not UTF-8" in refusal("latin.yaml")
    assert "larger than 1,000,000 bytes" in refusal(write("#" * 1_000_001))
    assert "nesting deeper than 20" in refusal(write("a: " + "[" * 21 + "]" * 21))
    assert "more than 20 aliases" in refusal(write("a: &a 1\nb: [" + "*a, " * 21 + "]"))


def test_where_a_run_may_be_written(write, tmp_path):
    inside = write("output_dir: runs/../kept/{recipe}\n")
    assert load_recipe(inside).output_dir == str(tmp_path / "kept" / "mine")
    # typed by the user
    assert load_recipe(inside, ["output_dir=../x"]).output_dir == str(tmp_path.parent / "x")
    assert load_recipe(inside, ["output_dir=/srv/{recipe}-2"]).output_dir == "/srv/mine-2"


@settings(max_examples=25)
@given(
    st.builds(
        lambda steps, rate, text, kinds: [
            f"train.steps={steps}",
            f"train.learning_rate={rate!r}",
            f"data.columns={{a: {text!r}}}",
            *kinds,
        ],
        st.integers(1, 10**9),
        st.floats(1e-12, 1e12),
        st.from_regex(r"[\w .:#e+-]{0,12}", fullmatch=True).filter(lambda t: "\n" not in t),
        st.lists(
            st.sampled_from(
                [
                    "model.adapter.r=4",
                    "target.kind=ema",
                    "objective=[{name: dpo, weight: 0.1}]",
                    "train.epochs=1.5",
                ]
            )
        ),
    )
)
def test_the_dump_reads_back_as_the_same_recipe(tmp_path_factory, overrides):
    recipe = load_recipe("dpo", overrides)
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file).model_dump() == recipe.model_dump()


YAML = st.text(st.sampled_from("ab:{}[]&*!#|>-?%@`'\",\n \t0.~$<"), max_size=60)


def parse(text, *overrides):
    """The data, or the words of the ConfigError; any other exception fails the test."""
    try:
        return parse_recipe(text, "fuzz.yaml", overrides)[0]
    except ConfigError as error:
        return str(error)


@given(st.text(max_size=40) | YAML)
def test_any_text_is_a_recipe_or_a_config_error(text):
    found = parse(text)
    assert isinstance(found, dict) or found.startswith("fuzz.yaml")


@given(st.text(max_size=20) | st.from_regex(r"[a-c](\.[a-c0-2]){0,3}=.{0,12}", fullmatch=True))
def test_any_override_is_applied_or_a_config_error(override):
    found = parse("a: {b: 1, c: [1, {a: 2}]}", override)
    assert isinstance(found, dict) or found.startswith(("override ", "fuzz.yaml"))


def test_a_config_error_needs_no_torch_and_no_second():
    code = (
        "import sys\nfrom alignkit.config.recipe import load_recipe\n"
        "try: load_recipe('dpo', ['train.stepz=1'])\nexcept ValueError as e: print(e)\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'accelerate') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert "Did you mean `steps`?" in out
    assert out.endswith("[]\n")


def test_recipes_load_and_run_from_the_top_of_the_package():
    code = (
        "import sys\nfrom alignkit import load_recipe\n"
        "print(load_recipe('dpo', ['train.steps=1']).train.steps)\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])\n"
        "from alignkit import run_recipe\nprint(run_recipe.__module__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines() == ["1", "[]", "alignkit.runs.launch"]


@pytest.mark.parametrize("name", alignkit.config.__all__)
def test_the_folder_exports_its_public_names(name):
    assert getattr(alignkit.config, name).__name__ == name
