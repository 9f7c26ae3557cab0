"""Adapters whose files are broken: exit 4 with the file's name, wherever one is loaded."""

import json
import shutil

import pytest
from world import save_model

from alignkit.config.model import AdapterConfig, ModelConfig
from alignkit.errors import ModelError
from alignkit.policies.adapters import add_adapter
from alignkit.policies.folding import merge
from alignkit.policies.load import load_frozen, load_model

BROKEN = {
    "null base": ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    "number as base": ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
    "empty base": ({"base_model_name_or_path": ""}, "base_model_name_or_path"),
    "list as base": ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
    "absent base": ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base"),
    "unknown type": ({"peft_type": "NOVEL"}, "peft_type 'NOVEL'"),
    "null type": ({"peft_type": None}, "peft_type None"),
    "list as type": ({"peft_type": ["LORA"]}, "peft_type"),
    "another type": ({"peft_type": "IA3"}, "damaged"),
    "text as rank": ({"r": "many"}, "damaged"),
    "null rank": ({"r": None}, "damaged"),
    "another rank": ({"r": 3}, "damaged"),
    "number as modules": ({"target_modules": 5}, "damaged"),
    "unknown modules": ({"target_modules": ["nothing"]}, "damaged"),
}
FILES = {
    "no JSON": b"{",
    "a list": b"[1]",
    "a number": b"3",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
    "empty": b"",
}
OF_BASE = ("null base", "number as base", "empty base", "list as base", "absent base")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_model(ModelConfig(name_or_path=base), device="cpu")
    add_adapter(model, AdapterConfig(r=2), seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "adapter")


def fails_everywhere(adapter, base, out, message, *, of_base=False):
    """As a frozen model, for `merge`, and, unless the base alone is wrong, to train on."""
    model, _ = load_model(ModelConfig(name_or_path=base), device="cpu")
    loads = [
        lambda: load_frozen(ModelConfig(name_or_path=str(adapter)), "teacher", device="cpu"),
        lambda: merge(adapter, out),
    ]
    if not of_base:
        loads.append(lambda: add_adapter(model, AdapterConfig(path=str(adapter)), seed=0))
    for load in loads:
        with pytest.raises(ModelError) as caught:
            load()
        assert caught.value.exit_code == 4
        assert message in str(caught.value)
    assert not out.exists()


def test_a_whole_adapter_is_loaded_everywhere(adapter, base, tmp_path):
    model, _ = load_model(ModelConfig(name_or_path=base), device="cpu")
    assert add_adapter(model, AdapterConfig(path=str(adapter)), seed=0)
    assert load_frozen(ModelConfig(name_or_path=str(adapter)), "teacher", device="cpu")
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("case", BROKEN)
def test_broken_settings(adapter, base, tmp_path, case):
    change, message = BROKEN[case]
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    fails_everywhere(adapter, base, tmp_path / "merged", message, of_base=case in OF_BASE)


@pytest.mark.parametrize("case", FILES)
def test_broken_files(adapter, base, tmp_path, case):
    (adapter / "adapter_config.json").write_bytes(FILES[case])
    fails_everywhere(adapter, base, tmp_path / "merged", "adapter_config.json")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_broken_weights(adapter, base, tmp_path, content):
    weights = adapter / "adapter_model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    fails_everywhere(adapter, base, tmp_path / "merged", str(adapter))
