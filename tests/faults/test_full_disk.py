"""A disk that refuses, by every command that writes: exit code 7, and nothing half-written."""

import errno
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from world import pair_rows, run, save_model, write_rows

from alignkit import files
from alignkit.errors import ResourceError
from alignkit.evaluation import evaluate as evaluation
from alignkit.training.run_folder import RunFolder

REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_tokenizer_to_a_full_disk(self, *_, **__):
    """The tokenizers library, written in Rust, raises a bare Exception where a file cannot be
    written, of which this is the text.
    """
    raise Exception("No space left on device (os error 28)")


@pytest.fixture
def adapter(tmp_path):
    """A folder with a LoRA adapter on a tiny model."""
    base = str(save_model(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("number", REFUSALS)
def test_errors_of_the_disk_are_told_from_others(tmp_path, number):
    with pytest.raises(ResourceError, match=os.strerror(number)), files.writing(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(ValueError, match="mine"), files.writing(tmp_path):
        raise ValueError("mine")


def test_errors_of_libraries_in_rust_are_known(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    missing = tmp_path / "missing"
    with pytest.raises(ResourceError, match="os error 2"), files.writing(tmp_path):
        tokenizer.backend_tokenizer.save(str(missing / "tokenizer.json"))
    with pytest.raises(ResourceError), files.writing(tmp_path):
        save_file({"a": torch.zeros(9)}, missing / "a.safetensors")


def test_merge(adapter, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_tokenizer_to_a_full_disk)
        assert run("merge", adapter, "--to", tmp_path / "merged") == 7
    assert "merged: No space left" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", full)
        assert run("merge", adapter, "--to", tmp_path / "merged") == 7
    assert sorted(tmp_path.iterdir()) == before

    # What a killed attempt left is in nobody's way.
    (tmp_path / ".tmp-merged").mkdir()
    (tmp_path / ".tmp-merged" / "half").write_text("")
    assert run("merge", adapter, "--to", tmp_path / "merged") == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "merged"])


def test_eval(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda request: measured.append(request) or {"models": []}
    )
    monkeypatch.setattr(evaluation, "show", lambda *_: None)
    model = save_model(tmp_path / "model")
    command = ["eval", model, "--reference", model, "--prompts", "prompts.jsonl"]

    (tmp_path / "file").write_text("")
    assert run(*command, "--to", tmp_path / "file" / "eval.json") == 7
    assert measured == []  # refused before the work is done
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", full)
        assert run(*command, "--to", tmp_path / "new" / "eval.json") == 7
    assert list((tmp_path / "new").iterdir()) == []
    assert run(*command, "--to", tmp_path / "new" / "eval.json") == 0
    assert (tmp_path / "new" / "eval.json").read_text() == '{\n "models": []\n}\n'


def test_the_reference_store(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    (tmp_path / "file").write_text("")
    command = [
        "train", "dpo", f"model.name_or_path={save_model(tmp_path / 'model')}", "train.steps=1",
        f"data.train={tmp_path / 'pairs.jsonl'}", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert run(*command, f"reference.store={tmp_path / 'file' / 'store'}") == 7
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", full)
        assert run(*command, f"reference.store={tmp_path / 'store'}") == 7
    assert "safetensors: No space left on device; free space" in capsys.readouterr().err
    assert [path.suffix for path in (tmp_path / "store").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()


def test_recipes_copy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run("recipes", "copy", "dpo", tmp_path / "file" / "mine.yaml") == 7
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", full)
        assert run("recipes", "copy", "dpo", tmp_path / "mine.yaml") == 7
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_tokenizer_of_a_finished_run(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()

    def write(place: Path):
        (place / "weights").write_text("whole")
        save_tokenizer_to_a_full_disk(tokenizer)

    with pytest.raises(ResourceError, match="No space left"):
        folder.save_model(write, "card")
    assert list(folder.path.iterdir()) == []
