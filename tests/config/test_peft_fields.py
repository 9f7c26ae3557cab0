"""What is read from peft's source is what peft says once it is imported."""

from dataclasses import fields
from types import SimpleNamespace

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from alignkit.config import peft_fields
from alignkit.config.peft_fields import peft_kinds


def test_kinds_and_fields_are_pefts_own():
    expected = {
        str(getattr(kind, "value", kind)): (cls.__name__, {field.name for field in fields(cls)})
        for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    assert {kind: (name, set(known)) for kind, (name, known) in peft_kinds().items()} == expected


def test_a_class_whose_base_is_elsewhere_has_unknown_fields(tmp_path, monkeypatch):
    (tmp_path / "tuners" / "new").mkdir(parents=True)
    (tmp_path / "config.py").write_text("class PeftConfig(PushToHubMixin):\n    base: str\n")
    text = "class {0}Config({1}):\n    r: int\n    def f(self):\n        self.peft_type = PeftType.{0}\n"
    for name, base in (("NEW", "PeftConfig"), ("ODD", "elsewhere.Base")):
        (tmp_path / "tuners" / f"{name}.py").write_text(text.format(name, base))
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(peft_fields, "find_spec", lambda name: place)
    found = peft_kinds.__wrapped__()
    assert found == {
        "NEW": ("NEWConfig", {"base", "r"}),
        "ODD": ("ODDConfig", set()),
    }


def test_without_peft_nothing_is_known(monkeypatch):
    monkeypatch.setattr(peft_fields, "find_spec", lambda name: None)
    assert peft_kinds.__wrapped__() == {}
