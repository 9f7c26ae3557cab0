"""Verifiers against completions that attack: forged and late answers, bombs, secrets, signals,
orphans. Each is tried with what this machine offers and with what weaker machines have.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkit.distributed import isolation, worker_pool
from alignkit.distributed.confinement import let_in
from alignkit.rewards import verifier as verifiers
from alignkit.rewards.verifier import Verifier

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")
FAILED = -1.0
CODE = '''
import os, signal, subprocess, sys, time

def inside(prompt, completion):
    """Runs the completion as code of its own process."""
    names = {}
    exec(completion, names)
    return names.get("score", 0.0)

def apart(prompt, completion):
    """Runs the completion in another process, and looks at its exit status."""
    return subprocess.run([sys.executable, "-c", completion], capture_output=True).returncode == 0
'''
GOOD = "score = 0.75"
LIES = """
import os
for descriptor in range(1, 64):
    for line in (b'{"value": 1.0}', b'{"id": "00", "value": 1.0}', b'1.0', b'{"ready": true}'):
        try:
            os.write(descriptor, line + b'\\n')
        except OSError:
            pass
"""
LIMIT = 0.5  # seconds for a completion: an attack is let run until then
NAMESPACE = (*isolation.user_namespace(), *isolation._NEW_PROCESSES)
WEAKER = {
    "namespace": isolation.Isolation("namespace", NAMESPACE),
    "bubblewrap": isolation.Isolation("bubblewrap", isolation._BUBBLEWRAP),
    "user without namespaces": isolation.Isolation("user", (), 61184 + os.getpid() % 4336),
    "none": isolation.Isolation("none"),
}


def lacking(chosen: isolation.Isolation) -> str:
    """What this machine would need for one of the weaker kinds; empty where it has it."""
    if chosen.prefix and not isolation._works(chosen.prefix):
        return f"needs {chosen.prefix[0]} and user namespaces"
    if chosen.kind == "user" and isolation.choose().kind != "user":
        return "needs root"
    return ""


@pytest.fixture(scope="module", params=["offered", *WEAKER])
def kind(request):
    """What this machine offers, or a weaker kind in its place."""
    if request.param == "offered":
        yield isolation.choose().kind
        return
    chosen = WEAKER[request.param]
    if needs := lacking(chosen):
        pytest.skip(needs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verifiers, "choose", lambda: chosen)
        patched.setattr(verifiers, "hide_process", lambda: None)  # not for good, in a test process
        yield chosen.kind


@pytest.fixture
def spec(tmp_path) -> Path:
    file = tmp_path / "attacked.py"
    file.write_text(CODE)
    return file


@pytest.fixture(scope="module")
def attacked(kind, tmp_path_factory):
    """One verifier for all attacks of a kind: none may harm what comes after it."""
    file = tmp_path_factory.mktemp("shared") / "attacked.py"
    file.write_text(CODE)
    verifier = Verifier(f"{file}:inside", timeout=LIMIT, failed=FAILED, workers=1, memory_mb=512)
    assert scores(verifier, GOOD) == [0.75]
    yield verifier, file
    verifier.close()
    assert processes(file) == []


@pytest.fixture
def make(spec, kind):
    made = []

    def verifier(name="inside", **fields):
        fields = {"timeout": LIMIT, "failed": FAILED, "workers": 1, **fields}
        made.append(Verifier(f"{spec}:{name}", **fields))
        return made[-1]

    yield verifier
    for one in made:
        one.close()
    assert processes(spec) == []


def processes(spec: Path) -> list[int]:
    """Processes whose command line names this test's verifier: workers and their children."""
    named = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
            state = (entry.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{spec}:".encode() in command and state != "Z":
            named.append(int(entry.parent.name))
    return named


def gone(spec: Path, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while processes(spec) and time.monotonic() < until:
        time.sleep(0.05)
    return not processes(spec)


def scores(verifier, *completions):
    return verifier(["p"] * len(completions), list(completions))


def test_forged_lines_cost_their_completion_and_shift_no_other(attacked):
    verifier, _ = attacked
    forged = LIES + "score = 0.0"
    assert scores(verifier, GOOD, forged, "score = 0.25", forged, GOOD) == [
        0.75, FAILED, 0.25, FAILED, 0.75
    ]  # fmt: skip


def test_a_process_that_the_verifier_starts_has_no_way_to_the_answer(make):
    """The parent's descriptors and memory are closed to it, and so are the worker's."""
    into_others = """
import os, pathlib, sys
for process in pathlib.Path('/proc').glob('[0-9]*'):
    if process.name == str(os.getpid()):
        continue
    for place in [*(process / 'fd' / str(number) for number in range(3, 40)), process / 'mem']:
        try:
            place.open('wb').write(b'{"value": 1.0}\\n')
        except OSError:
            continue
        os.abort()
sys.exit(7)
"""
    chosen = verifiers.choose()
    if os.geteuid() == 0 and not chosen.prefix:
        if chosen.user is None:
            pytest.skip("root's code reaches everything, unless another user runs it")
        if let_in([sys.base_prefix, os.path.realpath(sys.executable)], own_mounts=False):
            pytest.skip("another user cannot start this Python")
    verifier = make("apart", timeout=20.0)
    assert scores(verifier, "pass", into_others, "pass") == [1, 0, 1]
    assert verifier.metrics == {"failed": 0}


def test_an_answer_that_comes_late_reaches_no_other_completion(make, tmp_path):
    late = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.1)
        {LIES.strip().replace(chr(10), chr(10) + "        ")}
        os._exit(0)
    os._exit(0)
score = 0.5
"""
    slow = "import time; time.sleep(0.3); score = 0.25"
    assert scores(make(timeout=5.0), late, slow, GOOD) == [0.5, 0.25, 0.75]


def test_a_sleeper_without_alarm_then_a_long_question(attacked):
    verifier, _ = attacked
    sleeper = "import signal, time; signal.alarm(0); time.sleep(60)"
    long = "score = 0.75  #" + "x" * 300_000
    began = time.monotonic()
    assert scores(verifier, sleeper, long) == [FAILED, 0.75]
    assert time.monotonic() - began < 20


def test_a_worker_that_hangs_itself_is_replaced_in_time(attacked, monkeypatch):
    monkeypatch.setattr(worker_pool, "_END", 0.1)
    verifier, _ = attacked
    assert scores(verifier, GOOD) == [0.75]
    worker = verifier.workers[0]
    os.killpg(worker.child.pid, signal.SIGSTOP)
    began = time.monotonic()
    answer = worker.ask({"prompt": "p", "completion": "x" * 500_000, "columns": {}}, 0.2)
    assert answer == {"failed": "its question was not read in time"}
    assert time.monotonic() - began < 10
    assert scores(verifier, GOOD) == [0.75]


BOMBS = {
    "forks": "import os\nwhile True:\n  try:\n    os.fork()\n  except OSError:\n    pass",
    "sessions": "import os, time\nfor _ in range(20):\n  if os.fork() == 0:\n    os.setsid()\n"
    "    os.fork(); time.sleep(60)\ntime.sleep(60)",
    "memory": "b = []\nwhile True: b.append(bytearray(1 << 26))",
    "answers": "import os\nwhile True:\n  for d in range(3, 64):\n    try:\n"
    "      os.write(d, b'x' * 65536)\n    except OSError:\n      pass",
    "exit": "raise SystemExit(0)",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_one_score(attacked, bomb):
    verifier, file = attacked
    before = scores(verifier, GOOD)
    worker_alone = len(processes(file))
    began = time.monotonic()
    assert scores(verifier, BOMBS[bomb], GOOD) == [FAILED, 0.75]
    assert time.monotonic() - began < 20
    assert before == [0.75]
    assert len(processes(file)) == worker_alone


def test_output_goes_nowhere(make, capfd):
    prints = "import os\nwhile True:\n  os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)"
    assert scores(make(), prints, GOOD) == [FAILED, 0.75]
    out = capfd.readouterr()
    assert "xxx" not in out.out + out.err
    assert "yyy" not in out.out + out.err


def test_no_file_grows_beyond_the_limit(attacked):
    verifier, _ = attacked
    grows = """
import os
path = f'/tmp/alignkit-grows-{os.getpid()}-{os.urandom(4).hex()}'
file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
os.unlink(path)
try:
    os.pwrite(file, b'x', 600 << 20)
except OSError:
    score = 0.5
"""
    assert scores(verifier, grows) == [0.5]


def test_secrets_of_the_run_are_out_of_reach(make, monkeypatch, kind):
    if kind == "none":
        pytest.skip("tried in a run of its own below")
    looks = """
import os
score = 0.0
for process in [str(os.getppid()), *filter(str.isdigit, os.listdir('/proc'))]:
    try:
        if b'sk-SECRET' in open(f'/proc/{process}/environ', 'rb').read():
            score = 1.0
    except OSError:
        pass
"""
    secret_holder = subprocess.Popen(["sleep", "60"], env={"TOKEN": "sk-SECRET", **os.environ})
    monkeypatch.setenv("TOKEN", "sk-SECRET")
    try:
        assert scores(make(timeout=10.0), looks) == [0.0]
    finally:
        secret_holder.kill()
        secret_holder.wait()


def test_signals_reach_neither_the_run_nor_the_worker(attacked, kind):
    verifier, _ = attacked
    if kind == "none":
        pytest.skip("nothing keeps signals away there, as docs/reliability.md says")
    victim = subprocess.Popen(["sleep", "60"])
    kills = f"""
import os, signal
for process in (os.getppid(), {os.getpid()}, {victim.pid}, 1, -1):
    for number in (signal.SIGKILL, signal.SIGSTOP):
        try:
            os.kill(process, number)
        except OSError:
            pass
score = 0.5
"""
    try:
        assert scores(verifier, kills, GOOD) == [0.5, 0.75]
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


ORPHANS = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        os._exit(0)
time.sleep(0.2)
score = 0.5
"""


def test_orphans_in_sessions_of_their_own_end_with_their_completion(make, spec):
    verifier = make(timeout=5.0)
    assert scores(verifier, GOOD) == [0.75]
    worker_alone = len(processes(spec))
    assert scores(verifier, ORPHANS) == [0.5]
    assert len(processes(spec)) == worker_alone


RUN = """
import json, sys, threading
from alignkit.distributed import isolation
from alignkit.rewards import verifier as verifiers
completion, kinds = json.load(sys.stdin)
threads = []
for spec, chosen in kinds:
    if chosen:
        verifiers.choose = lambda: isolation.Isolation(*chosen)
    v = verifiers.Verifier(spec + ":inside", timeout=60, workers=1)
    call = lambda v=v: print(v(["p"], [completion]), flush=True)
    threads.append(threading.Thread(target=call))
    threads[-1].start()
for thread in threads:  # a main thread that ends takes the verifiers' threads with it
    thread.join()
"""


def start_run(completion, kinds, **environment):
    """A run whose verifiers, one for each of `kinds`, judge the completion at the same time. `kinds`:
    a verifier's file -> its isolation, None for what the machine offers.
    """
    chosen = [(str(spec), one and (one.kind, one.prefix, one.user)) for spec, one in kinds.items()]
    run = subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    run.stdin.write(json.dumps((completion, chosen)))
    run.stdin.close()
    return run


def test_a_run_that_is_killed_leaves_no_process(tmp_path):
    """Every kind that this machine has, in one run."""
    kinds = {"offered": None} | {name: one for name, one in WEAKER.items() if not lacking(one)}
    specs = {}
    for number, one in enumerate(kinds.values()):
        spec = tmp_path / f"attacked{number}.py"
        spec.write_text(CODE)
        specs[spec] = one
    run = start_run(ORPHANS + "\ntime.sleep(60)", specs)

    # Two looks that see the same: the parents of the orphans live for a moment only.
    until = time.monotonic() + 120
    before, now = [], [processes(spec) for spec in specs]
    while (min(map(len, now)) < 5 or now != before) and time.monotonic() < until:
        time.sleep(0.2)
        before, now = now, [processes(spec) for spec in specs]
    assert min(map(len, now)) >= 5

    run.kill()
    run.wait()
    assert [name for name, spec in zip(kinds, specs) if not gone(spec)] == []


def test_without_isolation_the_run_hides_its_secrets_and_says_so(spec):
    if os.geteuid() == 0:
        pytest.skip("root reads everything, unless another user runs the code")
    looks = """
import os
score = 0.0
for process in filter(str.isdigit, os.listdir('/proc')):
    try:
        score += b'sk-SECRET' in open(f'/proc/{process}/environ', 'rb').read()
    except OSError:
        pass
"""
    run = start_run(looks, {spec: isolation.Isolation("none")}, TOKEN="sk-SECRET")
    assert run.stdout.read() == "[0.0]\n"
    assert "offers neither another user nor process namespaces" in run.stderr.read()
