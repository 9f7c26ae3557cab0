"""The report as a person meets it: in a browser without network, in Markdown, and with hostile text
in it.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from alignkit.comparison.plots import COLOURS, draw, styles
from alignkit.comparison.report import write_report
from alignkit.evaluation.blocks import Heading, Items, Picture, Table, Text, html, markdown

FIGURES = ("length", "ended", "entropy", "distinct_1", "distinct_2", "forward_kl", "kl_per_token")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def span(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half, "level": 0.95}


def results(labels=("dpo", "rpg"), exact=True):
    """What `gather` returns, made by hand: two settings per objective, one failed run."""
    runs, curves, training = [], [], {}
    for i, label in enumerate(labels):
        points = []
        for j, kl in enumerate((0.6, 1.4)):
            name, score = f"{label}-beta={j + 1}-seed=0", 0.8 * kl - 0.1 * i
            runs.append(
                {
                    "name": name, "label": label, "swept": {"beta": j + 1}, "seed": 0, "status": "finished", "reason": "",
                    "seconds": 31.4, "cpu_seconds": 29.0,
                    "figures": {**dict.fromkeys(FIGURES, span(0.5)), "score": span(score), "kl": span(kl)},
                    "standard_errors": {"score": 0.01, "kl": 0.02},
                    "wins": {"rate": span(0.7), "invalid": 0.0, "length_controlled": 0.69, "words": ""},
                    "calibration": {
                        "accuracy": 0.75, "error": 0.031, "confidences": [0.6, 0.9], "accuracies": [0.6, 0.9], "counts": [60, 40],
                    },
                }
            )  # fmt: skip
            training[name] = {"metric": "reward", "step": [1, 2, 3], "value": [0.0, 0.1 * i, 0.4]}
            points.append(
                {
                    "setting": f"beta={j + 1}",
                    "kl": span(kl),
                    "score": span(score),
                    "efficiency": 0.95 if exact else None,
                }
            )
        at = np.linspace(0, 1.4, 5)
        band = {"at": at, "score": 0.8 * at, "low": 0.8 * at - 0.05, "high": 0.8 * at + 0.05}
        curves.append(
            {
                "label": label,
                "points": points,
                "band": {key: value.tolist() for key, value in band.items()},
            }
        )
    failed = {
        "name": "bad-seed=0",
        "label": "bad",
        "swept": {},
        "seed": 0,
        "status": "failed",
        "seconds": 2.0,
        "cpu_seconds": 1.0,
    }
    runs.append({**failed, "reason": "the reward said <script>alert(1)</script> | and fell"})
    training["bad-seed=0"] = {"metric": None, "step": [], "value": []}
    at = [0.0, 1.0, 2.0]
    words = "dpo over rpg at matched KL 1.4: +0.100 [0.050, 0.150]"
    return {
        "recipe": "mine.yaml", "model": "task", "data": "task:reviews", "exact": exact, "prompts": 4, "samples": 8, "seeds": [0],
        "seconds": 100.0, "base": {**dict.fromkeys(FIGURES, span(0.5)), "score": span(0.0)}, "runs": runs, "curves": curves,
        "training": training,
        "baselines": {
            "optimal": {"kl": at, "score": [0.0, 0.95, 1.6]} if exact else None,
            "best_of_n": [{"n": 2, "kl": span(0.19), "score": span(0.3), "folklore": 0.193}],
            "tilted": [] if exact else [{"beta": 0.5, "kl": span(0.7), "score": span(0.6), "effective": 12.3}],
            "samples": 64,
        },
        "verdicts": {
            "low": 0.6,
            "kl": 1.4,
            "words": "",
            "areas": [{"label": label, "area": span(0.4 - 0.1 * i)} for i, label in enumerate(labels)],
            "pairs": [{"first": "dpo", "second": "rpg", "kl": 1.4, "difference": span(0.1), "words": words}],
        },
        "samples_shown": {
            "runs": {label: f"{label}-beta=2-seed=0" for label in labels},
            "rows": [
                {
                    "prompt": "costs $5 <b>each</b> | or so", "before": {"text": " no\nway", "score": -1.0},
                    "after": {label: {"text": " **yes**", "score": None} for label in labels},
                }
            ],
        },
        "pass_at_k": [{"name": "base", "k": [1, 2], "pass": [0.2, 0.3], "majority": [0.2, 0.2]}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(json.loads(json.dumps(results())), folder)
    return folder


def test_the_page_opens_in_a_browser_without_network(written, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser found (looked for {', '.join(BROWSERS)})")
    page = (written / "report.html").read_text()
    probe = """<script>onload = () => { const images = [...document.images];
      document.title = JSON.stringify({images: images.length,
      loaded: images.filter(i => i.complete && i.naturalWidth > 300).length,
      wide: Math.max(0, document.documentElement.scrollWidth - innerWidth), requests: performance.getEntriesByType("resource")
      .filter(r => !r.name.startsWith("data:")).length, tables: document.querySelectorAll("table").length,
      alerted: document.querySelectorAll("td script, li script").length}); }</script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1200,1600",
        "--dump-dom",
        f"file://{tmp_path / 'page.html'}",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", shown)[1].replace("&quot;", '"'))
    assert seen == {
        "images": 5,
        "loaded": 5,
        "wide": 0,
        "requests": 0,
        "tables": seen["tables"],
        "alerted": 0,
    }
    assert seen["tables"] >= 8


def test_the_page_holds_everything_and_nothing_runs(written):
    page = (written / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;each&lt;/b&gt;" in page
    assert all(
        (written / f"{name}.png").stat().st_size < 150_000
        for name in ("frontier", "training", "samples")
    )


def test_the_markdown_says_the_same(written):
    text = (written / "report.md").read_text()
    for words in (
        "`dpo`, 0.400 [0.350, 0.450]",
        "Highest mean gain over the base model from 0.6 to 1.4 nats, which the runs of all "
        "objectives span: `dpo`, 0.400",
        "Pairs of objectives: 1; comparable at matched KL: 1; a difference is shown for 1.",
        "Efficiency above 0.9 somewhere: `dpo`, `rpg`",
        "5 runs, 1 failed",
        "- dpo over rpg at matched KL 1.4: +0.100 [0.050, 0.150]",
        "`bad-seed=0` failed: the reward said",
        "| dpo | beta=1 | 0.600 [0.550, 0.650] | 0.480 [0.430, 0.530] | 0.950 |",
        "| 2 | 0.190 [0.140, 0.240] | 0.193 | 0.300 [0.250, 0.350] |",
        "costs $5 &lt;b>each&lt;/b> \\| or so",
        "one seed, so they say nothing of the luck of a training",
    ):
        assert words in text, words
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("| bad-seed=0")]
    assert widths == [8]  # a cell's bar did not open another


def test_a_comparison_without_results_is_still_a_report(tmp_path):
    nothing = results(labels=())
    no_verdicts = {"pairs": [], "areas": [], "low": None, "kl": None, "words": ""}
    nothing |= {"verdicts": no_verdicts, "pass_at_k": []}
    nothing["samples_shown"] = {"runs": {}, "rows": []}
    write_report(nothing, tmp_path)
    assert "1 runs, 1 failed" in (tmp_path / "report.md").read_text()
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_what_is_not_comparable_is_said_and_nothing_is_ranked(tmp_path):
    apart = results()
    words = "dpo and rpg: not comparable, no run of rpg below 1.2 nats"
    apart["verdicts"] = {
        "pairs": [
            {"first": "dpo", "second": "rpg", "kl": None, "difference": None, "words": words}
        ],
        "areas": [],
        "low": None,
        "kl": None,
        "words": "mean gains are not comparable, no run of rpg below 1.2 nats",
    }
    write_report(apart, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"- {words}" in text
    assert "- Mean gains are not comparable, no run of rpg below 1.2 nats." in text
    assert "comparable at matched KL: 0; a difference is shown for 0" in text
    assert "Highest mean gain" not in text


def test_pictures_without_an_optimum_show_the_estimates(tmp_path):
    files = draw(results(exact=False), tmp_path)
    assert set(files) == {"frontier", "training", "calibration", "pass_at_k", "samples"}
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_differ_in_colour_marker_and_line():
    looks = list(styles(results(labels=tuple("abcdefg"))).values())
    assert (
        len({look["color"] for look in looks})
        == len({look["marker"] for look in looks})
        == len(looks)
        == 8
    )
    assert len(set(COLOURS)) == 8


def test_the_document_escapes_what_it_is_given(tmp_path):
    blocks = [
        Heading("<h>"),
        Text("`a<b`"),
        Items(["x & y"]),
        Table(["n", "t"], [["1", "a|b\nc"], ["2", "<i>"]], "more"),
    ]
    assert "| 1 | a\\|b c |\n| 2 | &lt;i> |" in markdown("T", blocks)
    page = html("T", blocks, tmp_path)
    assert "<h2>&lt;h&gt;</h2>" in page
    assert "<code>a&lt;b</code>" in page
    assert '<td class="number">1</td><td>a|b\nc</td>' in page
    assert "<summary>more</summary>" in page
    (tmp_path / "p.png").write_bytes(b"png")
    assert 'alt="a &quot;name&quot;" src="data:image/png;base64,cG5n"' in html(
        "T", [Picture("p.png", 'a "name"', "c")], tmp_path
    )


def test_labels_and_paths_are_shown_and_never_obeyed(tmp_path):
    hostile = "x`<img src=a onerror=b>[c](d) $\\frac$ \x1b[2J\n\n<script>"
    content = results(labels=(hostile, "rpg"))
    content |= {"model": hostile, "data": hostile, "recipe": hostile}
    content["runs"][0]["reason"] = hostile
    write_report(content, tmp_path)

    page = (tmp_path / "report.html").read_text()
    assert "<img src=a" not in page
    assert "<script>" not in page

    text = (tmp_path / "report.md").read_text()
    assert "\x1b" not in text
    code = re.sub(r"(?<!\\\\)`[^`\n]+`", "", text)  # what stands in a code span is inert
    assert not re.search(r"<(img|script)|\]\(d\)", code)
