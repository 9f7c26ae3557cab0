"""`alignkit generate --toward`: what its options mean, and a completion."""

import pytest
from world import run, save_model

from alignkit.cli.generate import toward_section
from alignkit.errors import ConfigError


def test_options_become_a_section():
    assert toward_section(None, None, None, None, 0.5) is None
    smc = toward_section("r.py:f", "smc", 0.1, 16, 1.0)
    assert (smc.method, smc.particles, smc.beta, smc.fresh) == ("smc", 16, 0.1, 0)
    best = toward_section("r.py:f", "best_of", None, None, 1.0)
    assert (best.method, best.n, best.rewards[0].function) == ("best_of", 8, "r.py:f")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((None, "smc", None, None, 1.0), "--method goes with --toward"),
        (("r.py:f", "beam", 1.0, None, 1.0), "--method is beam"),
        (("r.py:f", "smc", None, None, 1.0), "needs --beta"),
        (("r.py:f", "smc", 0.0, None, 1.0), "greater than 0"),
        (("r.py:f", "smc", 1.0, None, 0.5), "--temperature is 0.5"),
        (("r.py:f", "best_of", 1.0, None, 1.0), "does not use `beta`"),
    ],
)
def test_what_does_not_belong_together_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        toward_section(*options)


@pytest.mark.parametrize("method", ["smc", "soft_best_of"])
def test_completions_lean_toward_the_reward(method, tmp_path, capsys):
    save_model(tmp_path / "base")
    (tmp_path / "worth.py").write_text(
        "def worth(completions, **_):\n    return [float('w5' in text.split()) for text in completions]\n"
    )
    arguments = ["generate", tmp_path / "base", "w3 w4", "--completions", 10, "--max-new-tokens", 3]
    toward = ["--toward", f"{tmp_path / 'worth.py'}:worth", "--beta", 0.05, "--method", method]
    assert run(*arguments) == 0
    plain = capsys.readouterr().out.count("w5")
    assert run(*arguments, *toward, "--particles", 64) == 0
    assert capsys.readouterr().out.count("w5") > max(plain, 5)
