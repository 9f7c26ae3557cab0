"""What a recipe, a model or a network can make alignkit do: nothing that the user did not ask for."""

import os
import socket

import pytest
import torch
from world import pair_rows, run, save_model, write_rows

from alignkit.config.judges import ALLOW_PRIVATE
from alignkit.config.model import ModelConfig
from alignkit.errors import ModelError
from alignkit.policies.load import load_model

CODE = "import pathlib\npathlib.Path({flag!r}).touch()\ndef f(prompts, completions, **columns): return [0.0] * len(prompts)\n"


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "mine.py").write_text(CODE.format(flag=str(tmp_path / "ran")))
    write_rows(tmp_path / "rows.jsonl", pair_rows(4))
    return tmp_path


def arguments(folder, recipe, *overrides):
    paths = [
        f"model.name_or_path={folder / 'model'}",
        f"data.train={folder / 'rows.jsonl'}",
        f"output_dir={folder / 'out'}",
    ]
    small = [
        "train.steps=1",
        "train.batch_size=2",
        "train.epochs=null",
        "rollout.completions=2",
        "rollout.max_new_tokens=3",
    ]
    return ["train", recipe, *paths, *small, *overrides]


CODE_FIELDS = {
    "objective": ("dpo", "objective={{import: '{0}:f'}}"),
    "reward": ("rloo", "rewards.0.function={0}:f"),
    "verifier": ("rloo", "rewards.0.verifier={0}:f"),
    "judge": ("nash_md", "judge.function={0}:f"),
    "model": ("dpo", "model.trust_remote_code=true"),
}


@pytest.mark.parametrize("field", CODE_FIELDS)
def test_safe_refuses_every_field_that_runs_code(folder, capsys, field):
    recipe, override = CODE_FIELDS[field]
    assert run(*arguments(folder, recipe, override.format(folder / "mine.py")), "--safe") == 2
    assert "--safe" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_code_is_announced(folder, capsys):
    assert run(*arguments(folder, "rloo", f"rewards.0.function={folder / 'mine.py'}:f")) == 0
    assert (
        f"alignkit: rewards.0.function runs code from {folder / 'mine.py'}:f"
        in capsys.readouterr().err
    )
    assert (folder / "ran").exists()


def test_a_run_opens_no_connection_and_no_port(folder, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a run wanted to use the network: {address}")

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    assert run(*arguments(folder, "rloo", f"rewards.0.function={folder / 'mine.py'}:f")) == 0


@pytest.mark.parametrize("allowed", [False, True])
def test_a_judge_on_a_private_network_needs_the_users_word(folder, capsys, monkeypatch, allowed):
    monkeypatch.setenv(ALLOW_PRIVATE, "")  # put back afterwards
    asked = []

    def unreachable(address, *_):
        asked.append(address)
        raise OSError

    monkeypatch.setattr("socket.create_connection", unreachable)
    chat = "judge={chat: {url: 'https://10.0.0.1/v1', model: m, retries: 0, breaker: 1}}"
    code = run(*arguments(folder, "nash_md", chat), *["--allow-private-judge"] * allowed)
    said = " ".join(capsys.readouterr().err.split())
    assert (code, set(asked)) == ((7, {("10.0.0.1", 443)}) if allowed else (2, set()))
    assert ("a private one needs --allow-private-judge" in said) != allowed
    # no recipe can
    assert (
        run(*arguments(folder, "nash_md", chat.replace("retries", "allow_private: true, retries")))
        == 2
    )


class Trap:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def test_a_pickle_in_a_models_folder_is_not_run(folder):
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"weight": Trap(str(folder / "ran"))}, folder / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(ModelConfig(name_or_path=str(folder / "model")), device="cpu")
    assert not (folder / "ran").exists()


def test_the_hubs_library_is_told_to_report_nothing(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert run("recipes", "list") == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
