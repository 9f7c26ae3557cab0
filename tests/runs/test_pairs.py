"""`alignkit pairs`: labels and rejection sampling by their distributions; the file it writes is one
that trains.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import save_model

from alignkit.cli.main import main
from alignkit.config.data import DataConfig
from alignkit.data.load import check
from alignkit.errors import ConfigError, DataError
from alignkit.runs.pairs import PairRequest, label, make_pairs, rejection_sample

REQUEST = PairRequest("model", "prompts")


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rejection_samples_the_tilted_distribution():
    """A pool of 20000 samples of p; 400 accepted follow p * exp(r / beta), 5 standard deviations
    allowed.
    """
    p, rewards, beta = [0.5, 0.3, 0.2], [0.0, 0.5, 1.0], 0.7
    pool = torch.multinomial(torch.tensor(p), 20000, replacement=True, generator=noise()).tolist()
    kept = rejection_sample([rewards[i] for i in pool], beta=beta, n=400, generator=noise(1))
    assert len(set(kept)) == 400
    tilted = [q * math.exp(r / beta) for q, r in zip(p, rewards)]
    counts = Counter(pool[i] for i in kept)
    for i, weight in enumerate(tilted):
        wanted = weight / sum(tilted)
        assert abs(counts[i] / 400 - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 400)


def test_rejection_limits():
    scores = [0.1, 0.9, 0.5, 0.7, 0.2]
    # the best, in order
    assert rejection_sample(scores, beta=1e-6, n=3, generator=noise()) == [
        1,
        3,
        2,
    ]
    firsts = Counter(
        rejection_sample(scores, beta=1e9, n=1, generator=noise(s))[0] for s in range(1000)
    )
    assert max(abs(firsts[i] - 200) for i in range(5)) < 5 * math.sqrt(1000 * 0.2 * 0.8)
    assert sorted(rejection_sample(scores, beta=0.1, n=99, generator=noise())) == [0, 1, 2, 3, 4]


def test_labels():
    assert label([0.3, 0.9, 0.1], replace(REQUEST, method="best_worst"), noise()) == [(1, 2)]
    assert label([0.5, 0.5], replace(REQUEST, method="best_worst"), noise()) == []
    sure = replace(REQUEST, label_temperature=0.0, pairs=2)
    assert label([0.3, 0.9, 0.4, 0.1, 7.0], sure, noise()) == [(1, 0), (2, 3)]
    assert label([0.3, 0.3], sure, noise()) == []
    generator = noise()
    wins = sum(label([0.0, 1.0], REQUEST, generator) == [(1, 0)] for _ in range(2000)) / 2000
    assert abs(wins - 1 / (1 + math.exp(-1))) < 5 * math.sqrt(0.2 / 2000)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    save_model(folder / "model")
    rows = [{"prompt": f"w{3 + i % 18} w{4 + i // 18}", "bonus": float(i % 2)} for i in range(30)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_reward.py").write_text(
        "def score(prompts, completions, bonus, **_):\n"
        "    return [None if 'w7' in c else len(c.split()) + b for c, b in zip(completions, bonus)]\n"
    )
    return folder


def test_the_file_trains_and_the_counts_add_up(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    main_arguments = [
        "pairs",
        "model",
        "prompts.jsonl",
        "--to",
        "out/pairs.jsonl",
        "--reward",
        "my_reward.py:score",
    ]
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *main_arguments,
                "--max-new-tokens",
                "8",
                "--label-temperature",
                "0",
                "--per-prompt",
                "2",
            ]
        )
    assert not ended.value.code
    rows = [json.loads(line) for line in Path("out/pairs.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    assert f"{len(rows):8} pairs written" in printed
    assert "      30 prompts" in printed
    assert "     120 completions" in printed
    assert len(rows) > 20
    for row in rows:
        assert row["chosen_score"] > row["rejected_score"]
        bonus = row["chosen_score"] - len(row["chosen"].split())
        assert bonus in (0.0, 1.0)
        assert row["rejected_score"] == len(row["rejected"].split()) + bonus
        assert row["chosen"].startswith(" ")  # as it follows its prompt
    report, refusal = check(DataConfig(), source="out/pairs.jsonl", family="pair")
    assert refusal is None
    assert (report.usable, report.format) == (len(rows), "pair")


def test_the_same_seed_makes_the_same_file(world, monkeypatch):
    monkeypatch.chdir(world)
    request = PairRequest(
        "model", "prompts.jsonl", "my_reward.py:score", method="rejection", max_new_tokens=6
    )
    for name in ("one", "two"):
        make_pairs(request, Path(f"{name}.jsonl"))
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    assert not list(Path().glob(".*.tmp"))
    with pytest.raises(ConfigError, match=r"one\.jsonl exists already"):
        make_pairs(request, Path("one.jsonl"))
    with pytest.raises(ConfigError, match="--safe"):
        make_pairs(replace(request, safe=True), Path("three.jsonl"))
    with pytest.raises(ConfigError, match="no reward; name one with --reward"):
        make_pairs(replace(request, reward=None), Path("three.jsonl"))
    Path("flat.py").write_text(
        "def score(prompts, completions, **_):\n    return [1.0 for c in completions]\n"
    )
    with pytest.raises(DataError, match="no pair is left"):
        make_pairs(
            replace(request, reward="flat.py:score", method="best_worst"), Path("three.jsonl")
        )
    assert not Path("three.jsonl").exists()


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"beta 0 \(above 0\)"):
        replace(REQUEST, beta=0)
    with pytest.raises(SystemExit) as ended:
        main(["pairs", "model", "prompts", "--to", "x.jsonl", "--method", "worst"])
    assert ended.value.code == 2
