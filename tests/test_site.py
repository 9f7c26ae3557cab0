"""`make docs` fails where a link is broken or a public name is on no page."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_the_command_of_make_docs_is_strict(tmp_path):
    """It is given a site of one bad page, with the project's own settings and hooks."""
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(r"^docs:.*\n\t.*?\$\(BIN\)/(mkdocs .*)$", makefile, re.MULTILINE)
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "bad.md").write_text("# Bad\n\n[a link](nowhere.md)\n")
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {pages}\nhooks: [{ROOT}/docs/site_hooks.py]\n"
        "nav: [bad.md]\nextra_css: []\n"
    )
    words = shlex.split(command)
    program = ROOT / ".venv" / "bin" / words[0]
    done = subprocess.run(
        [program, *words[1:], "-f", settings, "-d", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "link 'nowhere.md'" in done.stderr
    assert "dpo_loss is public but on no page" in done.stderr
