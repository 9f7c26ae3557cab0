"""A translator and a tester that train each other: what they learn, by enumeration of every draw, and
two rounds with small models.
"""

import runpy
import sys
from fractions import Fraction
from itertools import product
from math import prod
from pathlib import Path

import pytest
from world import save_model, write_rows

from alignkit.files import read_jsonl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mutual.py"
verified = runpy.run_path(str(EXAMPLE))["verified"]

# What each translation does on each test; the third text is no test.
TRANSLATIONS = {"right": Fraction(1, 6), "nearly": Fraction(1, 3), "wrong": Fraction(1, 2)}
TESTS = {"easy": Fraction(1, 2), "hard": Fraction(1, 4), "none": Fraction(1, 4)}
AGREES = {
    "right": {"easy": True, "hard": True, "none": None},
    "nearly": {"easy": True, "hard": False, "none": None},
    "wrong": {"easy": False, "hard": False, "none": None},
}


def agrees(prompt, translation, test):
    return AGREES[translation][test]


def learnt(translator, tester, n):
    """The expected number of times that each text is learned, over all draws of `n` of each."""
    texts = {text: Fraction(0) for text in (*translator, *tester)}
    for drawn in product(translator, repeat=n):
        for tests in product(tester, repeat=n):
            chance = prod(translator[t] for t in drawn) * prod(tester[u] for u in tests)
            for kept in verified("?", drawn, tests, agrees):
                for text in kept:
                    texts[text] += chance
    return texts


def test_what_is_learned_by_enumeration():
    """A translation as often as it is drawn and passes all tests of which there are some, a test as
    often as it is drawn and some translation fails it.
    """
    n = 2
    counts = learnt(TRANSLATIONS, TESTS, n)
    for text, chance in TRANSLATIONS.items():
        passes = sum(TESTS[test] for test in TESTS if AGREES[text][test] is not False)
        assert counts[text] == n * chance * (passes**n - TESTS["none"] ** n)
    for test, chance in TESTS.items():
        escapes = sum(TRANSLATIONS[t] for t in TRANSLATIONS if AGREES[t][test] is not False)
        assert counts[test] == n * chance * (1 - escapes**n)
    assert counts["none"] == 0


def test_with_exact_training_both_end_at_what_is_right():
    """Each learns the law of what was kept, where something was: after three rounds the translator is
    right, and the tester writes the one test that the last wrong translation failed.
    """
    translator, tester = dict(TRANSLATIONS), dict(TESTS)
    for _ in range(4):
        counts = learnt(translator, tester, 2)
        before = translator["right"]
        translator = law_of(counts, translator)
        tester = law_of(counts, tester)
        assert translator["right"] > before or before == 1
    assert translator == {"right": 1, "nearly": 0, "wrong": 0}
    assert tester == {"easy": 0, "hard": 1, "none": 0}


def law_of(counts, before):
    total = sum(counts[text] for text in before)
    return {text: counts[text] / total for text in before} if total else before


@pytest.mark.long
def test_rounds_of_both_and_going_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "translator")
    save_model(tmp_path / "tester", seed=1)
    write_rows(tmp_path / "programs.jsonl", [{"prompt": f"w{i}"} for i in range(3, 9)])
    Path("world.py").write_text(
        "def agrees(prompt, translation, test):\n"
        "    words = test.split()\n"
        "    return None if len(words) > 9 else words[0] not in translation.split()\n"
    )
    models = ["--translator", "translator", "--tester", "tester", "--samples", "6"]
    small = "train={steps: 2, batch_size: 2, warmup_steps: 0, save_every: 0, log_samples_every: 0}"
    words = ["programs.jsonl", "world.py:agrees", "mutual", *models, small]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "models: mutual/2/translator/model mutual/2/tester/model" in capsys.readouterr().out

    # The second round is drawn from what the first ended with, and nothing is trained twice.
    for role in ("translator", "tester"):
        rows = [read_jsonl(Path(f"mutual/{k}/{role}.jsonl")) for k in (1, 2)]
        assert rows[0] != rows[1]
        assert all(rows)
    before = {file: file.stat().st_mtime_ns for file in Path("mutual").rglob("*.safetensors")}
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert before == {file: file.stat().st_mtime_ns for file in before}
