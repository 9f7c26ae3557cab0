"""What a run tells its user comes out as it was written: brackets are not markup."""

import io
import logging

from rich.console import Console
from world import make_job, pairs, save_model

from alignkit.objectives.preference.dpo import DPO
from alignkit.training.loop import train
from alignkit.training.messages import shown_messages
from alignkit.training.progress import TrainProgress

# Closing tags without an opening one raise in rich's markup, opening ones vanish.
NOTES = ("prefix [/INST] is kept", "/data/[bold]/rows[1].jsonl", "[red]not red[/red]")
log = logging.getLogger("alignkit")


def test_notes_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    job = make_job(model, tmp_path / "run", DPO(), pairs(8), steps=1)
    job.notes = NOTES
    with job.run:
        train(job)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line in NOTES] == list(NOTES)
    assert log.handlers == []  # nothing is left behind


def test_messages_stand_above_the_bar_of_a_terminal():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200)
    with shown_messages(), TrainProgress(3, console=console) as progress:
        for note in NOTES:
            log.info(note)
        progress.step(1, {"loss": 0.5})
    for note in NOTES:
        assert terminal.getvalue().count(note) == 1


def test_a_program_with_a_handler_of_its_own_sees_each_message_once(capsys):
    seen = []
    own = logging.Handler()
    own.emit = lambda record: seen.append(record.getMessage())
    log.addHandler(own)
    try:
        with shown_messages():
            log.warning("[/INST]")
    finally:
        log.removeHandler(own)
    assert seen == ["[/INST]"]
    assert capsys.readouterr().err == ""
