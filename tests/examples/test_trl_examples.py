"""Each example with TRL runs as its first lines say and leaves a model that transformers or peft
loads; docs/trl.md is valid.
"""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from world import save_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("trl_hdpo", "trl_radpo_lora", "trl_rpg", "trl_custom_objective")
# one process for all of them: importing TRL takes longer than any of the trainings
RUN = """
import runpy, sys
model, rows, out, *scripts = sys.argv[1:]
for script in scripts:
    name = script.rpartition("/")[2].removesuffix(".py")
    sys.argv = [script, model, rows, f"{out}/{name}"]
    runpy.run_path(script, run_name="__main__")
    print("finished", name, flush=True)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the examples printed, and the folder with what they left."""
    folder = tmp_path_factory.mktemp("examples")
    model = save_model(folder / "model")
    rows = [
        {"prompt": f"w{3 + i} w4", "chosen": f" w{5 + i} w6", "rejected": " w7 w8 w9"}
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scripts = [str(ROOT / "examples" / f"{name}.py") for name in NAMES]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        RUN,
        str(model),
        str(folder / "rows.jsonl"),
        str(folder / "out"),
        *scripts,
    ]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
        "TQDM_DISABLE": "1",
    }
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300
    ), folder / "out"


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_example_runs(finished, name):
    done, out = finished
    assert f"finished {name}\n" in done.stdout, done.stderr[-2000:]
    assert {"model.safetensors", "adapter_model.safetensors"} & {
        p.name for p in (out / name).iterdir()
    }
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 120


def test_the_page_shows_what_can_be_imported():
    page = (ROOT / "docs" / "trl.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "docs/trl.md", "exec")
    for module, names in set(
        re.findall(r"^from (alignkit\S*) import (.+)$", "\n".join(blocks), re.MULTILINE)
    ):
        assert all(hasattr(import_module(module), name.strip()) for name in names.split(",")), (
            module
        )
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link
