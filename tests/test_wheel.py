"""The built wheel works away from this checkout: its files, its command line, its losses.

The wheel is built from the source distribution, as a release is, and installed without its
dependencies into a virtual environment of its own, which borrows them from this one. `make
test-wheel` runs this file.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path) -> str:
    """The standard output of a command that succeeds in `cwd`, with no path to this checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def fresh_environment(folder: Path, wheel: Path, borrowed: Path) -> Path:
    """A new virtual environment with the wheel alone, which also finds what is in `borrowed`."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = run(
        *(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"),
        *("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        cwd=folder,
    )
    assert not installed.strip(), installed
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "bin"


def requirements(*names: str) -> set[str]:
    """These distributions and all that they need, without extras."""
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in needed:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # its marker does not hold on this machine
            continue
        needed.add(name)
        waiting += [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return needed


def test_the_wheel_holds_the_package_and_its_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "alignkit/py.typed" in names
    recipes = {name for name in names if name.startswith("alignkit/configs/")}
    assert recipes == {f"alignkit/configs/{path.name}" for path in ROOT.glob("configs/*.yaml")}
    modules = {f"{path.relative_to(ROOT)}" for path in ROOT.glob("alignkit/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_line_works_without_the_checkout(wheel, tmp_path):
    packages = Path(sysconfig.get_path("purelib"))
    programs = fresh_environment(tmp_path / "environment", wheel, packages)
    where = run(
        programs / "python", "-c", "import alignkit; print(alignkit.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(tmp_path)

    listed = run(programs / "alignkit", "recipes", "list", cwd=tmp_path)
    recipes = {path.stem for path in ROOT.glob("configs/*.yaml")}
    assert {line.split()[0] for line in listed.splitlines()} == recipes

    printed = run(programs / "alignkit", "train", "dpo", "train.steps=5", cwd=tmp_path)
    assert "5 steps done; the model is in runs/dpo/model" in printed
    assert (tmp_path / "runs" / "dpo" / "model" / "config.json").is_file()


def test_the_losses_need_torch_and_pydantic_alone(wheel, tmp_path):
    borrowed = tmp_path / "packages"
    borrowed.mkdir()
    for name in requirements("torch", "pydantic"):
        for file in distribution(name).files or ():
            top = borrowed / file.parts[0]
            if file.parts[0] not in ("..", "bin") and not top.exists():
                top.symlink_to(distribution(name).locate_file(file.parts[0]))
    programs = fresh_environment(tmp_path / "environment", wheel, borrowed)

    code = """
import importlib.util
import torch
from alignkit.losses import dpo_loss
assert importlib.util.find_spec("transformers") is None
print(dpo_loss(*torch.tensor([[-1.0], [-2.0], [-1.5], [-1.5]]), beta=1.0).item())
"""
    assert float(run(programs / "python", "-c", code, cwd=tmp_path)) == pytest.approx(
        0.31326, abs=1e-5
    )
