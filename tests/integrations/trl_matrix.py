"""`make test-trl-matrix`: the contract tests against several releases of TRL, as a Markdown table.

Each wheel is installed without its dependencies into a folder of its own, which comes first on the
path; everything else is what is installed here. Releases up to 1.14 also import `requests`.
Arguments name some of the requirements below, to run those alone. Exit code 1 when a test fails or
a release is not refused that should be.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from importlib.util import find_spec
from pathlib import Path

import torch

RELEASES = ("trl==0.29.1", "trl==1.0.0", "trl==1.9.*", "trl==1.14.*", "trl<2")
REFUSED = ("trl==0.28.0",) if torch.cuda.is_available() else ("trl==0.28.0", "trl==1.15.0")
FIGURES = {
    "DPO": "test_dpo_equals",
    "GRPO": "test_grpo_equals",
    "2 processes": "test_two_processes",
}
HERE = Path(__file__).resolve().parent
ASK = "from alignkit import DPO; from alignkit.integrations.trl import as_trl_trainer; as_trl_trainer(DPO())"


def install(requirement: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The release's number, and an environment in which it is the one that Python finds."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "--target",
        str(folder),
    ]
    subprocess.run([*pip, "--no-deps", requirement], check=True)
    if find_spec("requests") is None:
        subprocess.run([*pip, "requests"], check=True)
    number = next(folder.glob("trl-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return number, {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def contract(folder: Path, env: dict[str, str]) -> tuple[list[str], bool]:
    """Cells of a release's row: tests, largest differences, seconds; and whether all tests passed."""
    report, began = folder / "report.xml", time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE),
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    root = xml.parse(report).getroot()
    suite = next(root.iter("testsuite")).attrib
    total, bad, skipped = (
        int(suite["tests"]),
        int(suite["failures"]) + int(suite["errors"]),
        int(suite["skipped"]),
    )
    worst = dict.fromkeys(FIGURES, 0.0)
    for case in root.iter("testcase"):
        for found in case.iter("property"):
            for figure, name in FIGURES.items():
                if case.attrib["name"].startswith(name) and found.attrib["name"] == "difference":
                    worst[figure] = max(worst[figure], float(found.attrib["value"]))
    passed = (
        f"{total - bad - skipped} passed"
        + f", {bad} failed" * bool(bad)
        + f", {skipped} skipped" * bool(skipped)
    )
    return [
        passed,
        *(f"{value:.1e}" for value in worst.values()),
        f"{time.monotonic() - began:.0f}",
    ], not done.returncode


def refusal(env: dict[str, str]) -> tuple[str, bool]:
    """What a user reads with a release that does not fit, and whether it is our sentence."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env, cwd=HERE.parents[1], capture_output=True, text=True
    )
    last = done.stderr.strip().rpartition("\n")[2]
    return last.partition(": ")[2], done.returncode != 0 and "ConfigError: trl" in last


def main(wanted: list[str]) -> int:
    """Print the table, row by row; 0 when everything is as it should be."""
    print(
        "| trl | contract tests | "
        + " | ".join(FIGURES)
        + " | seconds |\n|"
        + "---|" * (len(FIGURES) + 3),
        flush=True,
    )
    right = []
    with tempfile.TemporaryDirectory() as root:
        for number, requirement in enumerate(wanted or (*RELEASES, *REFUSED)):
            release, env = install(requirement, Path(root) / str(number))
            if requirement not in REFUSED:
                cells, fine = contract(Path(root) / str(number), env)
            else:
                sentence, fine = refusal(env)
                cells = [f"refused: {sentence}", *[""] * (len(FIGURES) + 1)]
            right.append(fine)
            print(f"| {release} | " + " | ".join(cells) + " |", flush=True)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
