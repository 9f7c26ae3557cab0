"""What the README and the guides say is true: their commands parse, their code runs, their links
and lists are right.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from world import pair_rows, save_model, write_rows

from alignkit.cli.main import app, main
from alignkit.config import build_objective, load_recipe
from alignkit.objectives import OBJECTIVES
from alignkit.testing import check_objective

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


def blocks(page, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def typed_commands(page):
    """The commands after a `$` in a page, each with what it printed."""
    console = "\n".join(blocks(page, "console"))
    return re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)


def commands(page):
    """Every command line of a page, continued lines joined, without comments and output."""
    shell = "\n".join(blocks(page, "(?:bash|sh)"))
    typed = [line for line, output in typed_commands(page) if not output.startswith("alignkit: ")]
    for line in [*shell.replace("\\\n", " ").splitlines(), *typed]:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        if words:
            yield words


def table(line_start):
    """The names in backticks of the README's tables whose line begins so."""
    (line,) = re.findall(rf"^\| {line_start} \|(.*)\|$", README, re.MULTILINE)
    return re.findall(r"`(\w+)`", line)


def check_alignkit(words):
    """Parse a command of alignkit, and the recipe and overrides of those that have some."""
    command = typer.main.get_command(app)
    context = command.make_context("alignkit", list(words[:1]), resilient_parsing=True)
    path = []
    while hasattr(command, "commands"):
        path.append(words[0])
        command = command.get_command(context, words[0])
        assert command is not None, f"there is no command {' '.join(path)}"
        words = words[1:]
    parsed = command.make_context(" ".join(path), [word for word in words if word != "..."])
    if path[0] in ("train", "compare") and not parsed.params["recipe"].endswith(".yaml"):
        recipe = load_recipe(parsed.params["recipe"], parsed.params["overrides"] or [])
        if not any("import" in word or "my_" in word for word in words):
            build_objective(recipe.objective, recipe.origin)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one(page):
    """alignkit's are parsed with their recipe and overrides, the others have what they name."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for program, *words in commands(page):
        if program == "alignkit" or words[:2] == ["-m", "alignkit"]:
            check_alignkit(words if program == "alignkit" else words[2:])
        elif program == "make":
            assert set(words) <= targets, words
        elif program == "python" and words[0] != "-m":
            assert (ROOT / words[0]).is_file(), words
        elif program == "pip":
            (extra,) = re.findall(r"^\.(?:\[(\w+)\])?$", words[-1])
            assert not extra or extra in extras["optional-dependencies"], words


@pytest.mark.parametrize("page", PAGES)
def test_an_error_that_a_page_shows_is_what_the_command_prints(page, capsys):
    for line, output in typed_commands(page):
        if output.startswith("alignkit: "):
            with pytest.raises(SystemExit):
                main(shlex.split(line)[1:])
            assert capsys.readouterr().err == output


def test_a_wrong_command_is_found():
    for words in (["tran", "dpo"], ["train", "dpo", "train.stepz=3"], ["train", "dpoo"]):
        with pytest.raises((Exception, SystemExit)):
            check_alignkit(words)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_compiles_and_imports_what_exists(page):
    for block in blocks(page, "python"):
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (alignkit\S*) import (.+)$", block, re.MULTILINE):
            for name in names.strip("()").split(","):
                assert hasattr(import_module(module), name.strip()), f"{page}: {module}.{name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_of_a_page_exist(page):
    folder = (ROOT / page).parent
    prose = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", prose):
        assert (folder / link).exists(), f"{page}: {link}"


def test_the_losses_in_a_loop_of_ones_own():
    """The second quick start trains its toy: the chosen answers become likelier."""
    (code,) = (block for block in blocks("README.md", "python") if "dpo_loss" in block)
    names = {}
    exec(code, names)  # noqa: S102
    policy = names["logits"].softmax(-1)
    assert float(policy[:2].sum().detach()) > 0.9
    torch.testing.assert_close(policy[0], policy[1])


def test_the_run_from_python(tmp_path, monkeypatch):
    """The code as it stands, with a small model and few steps."""
    (code,) = (block for block in blocks("README.md", "python") if "alignkit.train" in block)
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "MODEL")
    write_rows(tmp_path / "pairs.jsonl", pair_rows(12))
    for given, small in (("steps=300", "steps=2, batch_size=4"),):
        assert given in code
        code = code.replace(given, small)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "runs" / "mine" / "model").is_dir()


@pytest.mark.long
def test_the_script_for_trl(tmp_path):
    """The third quick start runs as it stands, with a small model in MODEL's place."""
    (code,) = (block for block in blocks("README.md", "python") if "as_trl_trainer" in block)
    save_model(tmp_path / "MODEL")
    rows = [
        {"prompt": f"w{3 + i} w4", "chosen": f" w{5 + i} w6", "rejected": " w7 w8 w9"}
        for i in range(2)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "script.py").write_text(code.replace('"MODEL"', f'"{tmp_path / "MODEL"}"'))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))


def test_the_objectives_by_family_are_the_registry():
    """Each name stands in the line of its folder."""
    lines = {
        "preference optimisation": "preference",
        "online RL": "online",
        "self-play": "self_play",
        "distillation": "distillation",
        "reward and preference models": "reward",
    }
    for title, folder in lines.items():
        registered = [name for name, path in OBJECTIVES.items() if path.startswith(f"{folder}.")]
        assert table(title) == registered


def test_the_page_of_objectives_is_what_its_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    made = import_module("make_objectives").make_page()
    assert (ROOT / "docs" / "objectives.md").read_text() == made


def test_the_badges_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = [line.split(" :: ")[-1] for line in project["classifiers"] if ":: Python ::" in line]
    badges = {path.stem: path.read_text() for path in (ROOT / "docs" / "badges").glob("*.svg")}
    assert " | ".join(python) in badges["python"]
    assert project["license"] in badges["licence"]
    assert (ROOT / "alignkit" / "py.typed").is_file()
    assert "py.typed" in badges["typed"]


def test_the_reliability_page_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    files = set(re.findall(r"`([\w/]*test_\w+\.py)`", page))
    assert len(files) > 15
    for file in files:
        assert (ROOT / "tests" / file).is_file(), file


def test_what_the_changelog_says_has_moved_is_there():
    moved = re.findall(
        r"^\| `([\w.]+)` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert len(moved) > 50
    for old, new in moved:
        assert ROOT.joinpath(*new.split(".")).with_suffix(".py").is_file(), new
        assert old != new


def test_the_objective_of_ones_own_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = "docs/custom_objectives.md"
    (code,) = (block for block in blocks(page, "python") if "my_losses.py" in block)
    Path("my_losses.py").write_text(code)
    override = next(
        words[3] for words in commands(page) if words[:3] == ["alignkit", "train", "dpo"]
    )
    objective = build_objective(load_recipe("dpo", [override]).objective)
    assert objective.margin == 2.0
    check_objective(objective)
