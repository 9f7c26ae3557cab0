"""Text of users and models is shown as it is: no terminal, table, picture or page obeys it."""

import io
import logging

import pytest
from rich.console import Console

from alignkit.cli.main import main
from alignkit.comparison.live_table import LiveTable
from alignkit.config.escaping import fenced, markdown_cell, markdown_line, plain, printable
from alignkit.data.report import Report
from alignkit.evaluation.table import show
from alignkit.training.messages import shown_messages

HOSTILE = "a[/INST] [bold]b[/bold] [red] \x1b[31mred\x1b]0;title\x07 \r\x9b2J \u202e \ud800"


def test_nothing_is_left_that_a_terminal_obeys():
    assert printable("a\tb\nc é \U0001f600") == "a\tb\nc é \U0001f600"
    assert printable("\x1b[31m\r\x07\x9b\x7f\u202e\ud800") == (
        "\\x1b[31m\\r\\x07\\x9b\\x7f\\u202e\\ud800"
    )
    assert plain(HOSTILE).plain == printable(HOSTILE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, `code<x>` and [0.1, 0.2]", "plain, `code<x>` and [0.1, 0.2]"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("`x`<img>`", "`x`&lt;img>\\`"),
        ("``<img>``", "'&lt;img>'"),
        ("a\n\n# title\n<b>", "a # title &lt;b>"),
        ("![](http://x/y.png)", "![]\\(http://x/y.png)"),
        ("back\\`slash`<b>`", "back\\\\`slash`&lt;b>\\`"),
        ("\x1b[2J", "\\\\x1b[2J"),
    ],
)
def test_a_line_of_markdown_holds_no_tag_link_or_block(text, expected):
    assert markdown_line(text) == expected


def test_cells_and_fences_cannot_be_left():
    assert markdown_cell("a|b\nc <d> \\") == "a\\|b c &lt;d> \\\\"
    assert fenced("yaml", ["a: b", "```", "<script>"]) == "````yaml\na: b\n```\n<script>\n````"
    assert fenced("", ["a"]) == "```\na\n```"


def printed(show_it, *, terminal):
    out = io.StringIO()
    show_it(Console(file=out, force_terminal=terminal, width=400, color_system=None))
    return out.getvalue()


FIGURES = {"figures": {"score": {"value": 1.0, "low": None}}}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_of_eval(terminal):
    results = {
        "base": {"name": HOSTILE, **FIGURES},
        "models": [{"name": f"models/{HOSTILE}", **FIGURES}],
        "settings": {"prompts": 1, "samples": 2, "max_new_tokens": 3, "reference": HOSTILE},
        "baselines": [{"n": 2, "score": 1.0, "kl": 0.5, "kl_bound": 0.6}],
        "verdicts": [HOSTILE],
    }
    text = printed(lambda console: show(results, console), terminal=terminal)
    assert text.count(printable(HOSTILE)) == 4
    assert "[95 % over prompts]" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_of_a_comparison(terminal, tmp_path, monkeypatch):
    from types import SimpleNamespace

    train = SimpleNamespace(steps=3)
    recipe = SimpleNamespace(output_dir=str(tmp_path), train=train)
    point = SimpleNamespace(name=HOSTILE, label=HOSTILE, recipe=recipe)
    states = [SimpleNamespace(status="waiting", reason="", seconds=0.0)]
    monkeypatch.setattr("alignkit.comparison.live_table.read_run_state", lambda point: states[-1])

    def watched(console):
        with LiveTable([point], 1, console) as table:
            table.watch([point])
            states.append(SimpleNamespace(status="failed", reason=HOSTILE, seconds=1.0))
            table.watch([])

    text = printed(watched, terminal=terminal)
    assert printable(HOSTILE) in text
    assert "\x1b[31m" not in text


def test_the_report_on_data():
    report = Report(source=HOSTILE, name=HOSTILE)
    text = printed(lambda console: console.print(report.table()), terminal=True)
    assert printable(HOSTILE).split() == text.partition(": 0 rows")[0].split()


def test_messages_and_errors_on_stderr(capsys, monkeypatch):
    log = logging.getLogger("alignkit")
    # pytest would keep the record, and xdist cannot send half of a surrogate pair.
    monkeypatch.setattr(log, "propagate", False)
    handlers, log.handlers = log.handlers, []
    try:
        with shown_messages():
            log.warning("%s", HOSTILE)
    finally:
        log.handlers = handlers
    assert capsys.readouterr().err == printable(HOSTILE) + "\n"

    with pytest.raises(SystemExit) as ended:
        main(["train", "dpo", f"objective.name={HOSTILE.replace(chr(0xD800), '')}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "[/INST]" in error
    assert "\x1b" not in error


def test_completions_that_generate_prints(capsys, monkeypatch):
    monkeypatch.setattr("alignkit.runs.trained_model.load_finished", lambda model: None)
    monkeypatch.setattr("alignkit.rollout.generate.generate", lambda *_, **__: [[HOSTILE, "b"]])
    main_arguments = ["generate", "model", "prompt"]
    with pytest.raises(SystemExit) as ended:
        main(main_arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out == printable(HOSTILE) + "\nb\n"


def test_the_table_of_verify(capsys, monkeypatch):
    from alignkit import testing
    from alignkit.oracles.invariances import Check

    checks = [Check("a[/b]", 1.0, 0.5, HOSTILE)]
    monkeypatch.setattr(testing, "run_checks", lambda objective: checks)
    monkeypatch.setenv("COLUMNS", "400")
    assert testing.verify(["dpo"]) == 1
    out = capsys.readouterr().out
    assert "a[/b]" in out
    assert "[/INST]" in out
    assert "\x1b[31mred" not in out
