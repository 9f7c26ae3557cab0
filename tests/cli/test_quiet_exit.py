"""Code of the user's that ends the program does not end a run as if it were done."""

import pytest
from world import run, save_model, write_rows


@pytest.mark.parametrize("where", ["import", "call", "call within a timeout"])
def test_a_reward_that_ends_the_program_does_not_end_it_as_done(tmp_path, capsys, where):
    ends = "raise SystemExit(0)"
    body = "return [0.0] * len(completions)" if where == "import" else ends
    (tmp_path / "reward.py").write_text(
        f"{ends if where == 'import' else ''}\ndef score(completions, **columns):\n    {body}\n"
    )
    timeout = ", timeout: 20" if "timeout" in where else ""
    arguments = [
        "train",
        "grpo",
        f"model.name_or_path={save_model(tmp_path / 'base')}",
        f"data.train={write_rows(tmp_path / 'rows.jsonl', [{'prompt': 'a', 'self': 1}])}",
        f"rewards=[{{function: {tmp_path / 'reward.py'}:score{timeout}}}]",
        "train.steps=1",
        "rollout.max_new_tokens=2",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert run(*arguments) == 2
    assert "called sys.exit(0), which would end it before it is done" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
