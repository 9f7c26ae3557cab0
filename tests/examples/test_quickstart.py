"""examples/quickstart.ipynb runs from top to bottom and prints what its text promises."""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


def cells(kind):
    """The sources of the notebook's cells of a kind, by their ids."""
    notebook = json.loads(NOTEBOOK.read_text())
    return {
        cell["id"]: "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == kind
    }


def test_it_is_a_notebook_of_plain_python_without_outputs():
    """No output is kept, so none can go stale; no cell needs more than Python to run."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert not re.search(r"^[%!]", "".join(cell["source"]), re.MULTILINE)


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Cell after cell in one namespace, as a kernel runs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {"__name__": "__main__"}
    printed = {}
    for cell, code in cells("code").items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"{NOTEBOOK.name}[{cell}]", "exec"), names)  # noqa: S102
        printed[cell] = out.getvalue()

    assert printed["dpo-by-hand"].split("[")[1] == printed["optimum"].split("[")[1]
    assert printed["check"].count("allowed") >= 5
    first, last = (line.split() for line in printed["train"].splitlines()[1:3])
    assert (first[1], last[1]) == ("1", "20")
    assert float(last[2]) < float(first[2])  # the loss fell
    for name in ("model", "metrics.jsonl", "recipe.yaml"):
        assert f"'{name}'" in printed["train"]
    assert "0.4321, 0.2303, 0.3376" in printed["nash"]
    gap = float(printed["nash"].split()[-1])
    assert gap == pytest.approx(0, abs=1e-6)
    assert os.listdir(tmp_path)


@pytest.mark.long
def test_a_kernel_shows_no_escape_codes(tmp_path, monkeypatch):
    """In a real kernel, with the environment of a terminal that has colours."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    monkeypatch.setenv("TERM", "xterm-256color")

    code = (
        "from alignkit import DPO, train\n"
        "from alignkit.tasks import resolve\n"
        "task = resolve('task:reviews_small')\n"
        "model, rows = str(task.model_folder), task.rows('pair')[:8]\n"
        f"train(DPO(), model=model, data=rows, output_dir={str(tmp_path / 'run')!r}, steps=2, batch_size=4)\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()

    shown = json.dumps(notebook.cells[0].outputs)
    assert "step 2/2" in shown
    assert "\\u001b" not in shown
