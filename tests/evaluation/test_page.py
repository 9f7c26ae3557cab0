"""The page of `alignkit eval`: everything is inside, its tables sort, and it fits a telephone."""

import json
import re
import shutil
import subprocess

import pytest
from world import run

from alignkit.evaluation.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "<script>alert(1)</script> & co"


def interval(value, width=0.1):
    return {"value": value, "low": value - width, "high": value + width, "level": 0.95}


def model(name, score, kl, low=None, calls=0.0, **more):
    means = {
        "score": interval(score),
        "kl": interval(kl),
        "sampled": interval(48.0),
        "reward_calls": interval(calls),
        "length": interval(6.0),
    }
    if low is not None:
        means["kl_low"] = interval(low)
    return {"name": name, "figures": means, "win_rate": interval(0.6), **more}


def results():
    models = [
        model("dpo", 1.2, 10.5),
        model("smc", 0.9, 1.1, low=0.8, calls=16.0),
        model("half/0.3", 0.5, 0.4, merge={"of": "abc", "share": 0.3}),
        model("half/0.7", 0.8, 2.2, merge={"of": "abc", "share": 0.7}),
        model(HOSTILE, 0.1, 0.05),
    ]
    names = ["base", *(each["name"] for each in models)]
    completions = {name: {"text": f"{HOSTILE} {'long ' * 30}", "score": 0.5} for name in names}
    completions["dpo"]["tokens"] = [["good", 1.5], [" bad", -0.75], [" plain", 0.0]]
    return {
        "settings": {
            "reference": "task:reviews", "prompts": 9, "samples": 8, "max_new_tokens": 12, "seed": 0,
        },
        "base": model("base", -0.4, 0.0),
        "models": models,
        "baselines": [{"n": 2, "score": 0.2, "kl": 0.19, "kl_bound": 0.193}],
        "optimal": {"kl": [0.0, 1.0, 2.0], "score": [-0.4, 1.0, 1.4]},
        "samples": [{"prompt": HOSTILE, "completions": completions}] * 3,
        "verdicts": ["dpo over base: +1.6 [1.4, 1.8]"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(results(), file)
    return file.read_text()


def test_everything_is_inside(page):
    for words in (
        "dpo",
        "0.800 to 1.100",
        "task:reviews",
        "joined by a line",
        "closed-form optimum",
    ):
        assert words in page
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") > 5


def test_tokens_are_shaded_by_their_numbers(page):
    good, bad, plain = re.findall(r'rgba\((\d+),\d+,\d+,([\d.]+)\)" title="([-+.\d]+)"', page)[:3]
    assert good == ("230", "0.41", "+1.50")  # 0.55 of 1.5 in 2 nats
    assert bad == ("33", "0.21", "-0.75")
    assert float(plain[1]) == 0.0


PROBE = """<script>onload = () => {
  const table = document.querySelector("table"), images = [...document.images];
  const column = index => [...table.tBodies[0].rows].map(row => row.cells[index].textContent);
  const head = table.tHead.rows[0].cells[2];
  head.click(); const up = column(0); head.click(); const down = column(0);
  table.tHead.rows[0].cells[0].click(); const named = column(0);
  parent.postMessage(JSON.stringify({up, down, named, sorted: head.getAttribute("aria-sort"),
    loaded: images.filter(i => i.complete && i.naturalWidth > 300).length,
    overflow: Math.max(0, document.documentElement.scrollWidth - innerWidth), width: innerWidth,
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length
  }), "*"); }</script></body>"""

# A window has a least width, a frame has none.
FRAME = """<!doctype html><script>onmessage = event => { document.title = event.data; }</script>
<iframe src="page.html" style="border: 0; width: %dpx; height: 900px"></iframe>"""


@pytest.mark.parametrize("width", [375, 1440])
def test_a_browser_without_network_shows_and_sorts_it(page, width, tmp_path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE))
    (tmp_path / "frame.html").write_text(FRAME % width)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"]
    options += ["--virtual-time-budget=5000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    shown = subprocess.run(
        [browser, *options, "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    title = re.search(r"<title>(\{.*?\})</title>", shown)[1]
    for entity, character in (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        title = title.replace(entity, character)
    seen = json.loads(title)

    by_kl = ["base", HOSTILE, "half/0.3", "smc", "half/0.7", "dpo"]
    assert seen["up"] == by_kl  # 10.5 stands above 2.2: numbers, not texts
    assert seen["down"] == by_kl[::-1]
    assert seen["named"] == sorted(by_kl, key=str.lower)
    assert (seen["loaded"], seen["overflow"], seen["requests"]) == (1, 0, 0)
    assert seen["width"] == width


def test_the_command_writes_the_page_beside_the_results(tmp_path, capsys):
    files = ["--to", tmp_path / "eval.json", "--html", tmp_path / "page.html"]
    request = ["eval", "task:reviews_small", "--samples", 2, "--credit"]
    assert run(*request, *files) == 0
    page = (tmp_path / "page.html").read_text()
    assert 'title="+0.00"' in page  # of a model that is its own reference
    assert run(*request, "--to", tmp_path / "again.json", *files[2:]) == 2
    assert "name another file with --html" in capsys.readouterr().err
