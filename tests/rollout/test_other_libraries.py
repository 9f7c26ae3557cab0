"""Environments of other libraries, played with the real packages where they are installed."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest
import torch
from episode_worlds import loaded, player, prompts
from world import save_model

from alignkit.batches import Draw
from alignkit.rollout.adapters import GymnasiumWorld, OpenEnvWorld
from alignkit.rollout.environment_pool import WorkerEnvironments


def direction(text):
    """The policy's word as one of four directions."""
    if not text.strip():
        raise ValueError(" w3")
    return int(text.split()[-1].removeprefix("w")) % 4


@pytest.fixture
def lake():
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")

    def world():
        frozen = gymnasium.make("FrozenLake-v1", render_mode="ansi", is_slippery=True)
        return GymnasiumWorld(frozen, act=direction, see=lambda place: f" w{3 + int(place)}")

    return world


def test_a_gymnasium_world_repeats_itself_under_a_seed_and_ends_as_it_says(lake):
    paths = []
    for number in (7, 7, 8):
        world = lake()
        world.seed(number)
        path = [world.reset(prompt="w3")]
        done = False
        while not done and len(path) < 100:
            text, reward, done = world.step("w4 w5")
            path.append((text, reward, done, world.state()))
        paths.append(path)
    assert paths[0] == paths[1]
    assert paths[0] != paths[2]
    assert paths[0][-1][2]
    assert world.step("") == (" w3", 0.0, False)


def test_episodes_in_a_gymnasium_world(lake, tmp_path):
    models = loaded(save_model(tmp_path))
    rows = player(models, lake, turns=6).episodes(prompts(2), Draw(4), step=0, prompt_ids=range(2))
    episodes = [episode for row in rows for episode in row]
    assert not any(episode.failed for episode in episodes)
    assert max(episode.turns for episode in episodes) > 2
    assert {episode.prompt.split()[-1] for episode in episodes} == {"w3"}  # the start of the lake


def test_a_file_that_adapts_a_world_is_loaded_in_processes_apart(lake, tmp_path):
    file = tmp_path / "lake.py"
    file.write_text(
        f"import sys\nsys.path += {[path for path in sys.path if path]!r}\n"
        "import gymnasium\nfrom alignkit.rollout.adapters import GymnasiumWorld\n\n"
        "def World():\n    lake = gymnasium.make('FrozenLake-v1', render_mode='ansi')\n"
        "    return GymnasiumWorld(lake, act=int, see=lambda _: lake.render())\n"
    )
    worlds = WorkerEnvironments(f"{file}:World", timeout=60.0)
    assert worlds.about.steps
    begun, step = (
        {"do": "reset", "row": {}, "seed": 3},
        {"do": "step", "text": "2"},
    )
    (first,) = worlds.ask([(0, begun)])
    (second,) = worlds.ask([(0, step)])
    worlds.close()
    assert "SFFF" in first["text"].replace("\x1b[41m", "").replace("\x1b[0m", "")
    assert second["done"] is False
    assert second["state"] == second["text"]


SERVER = """
import sys
sys.path += {path!r}
import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Said(Action):
    words: str


class Heard(Observation):
    words: str = ""


class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **_):
        self.turn = 0
        return Heard(words=f" w{{3 + seed % 2}}", done=False, reward=0.0)

    def step(self, action, timeout_s=None, **_):
        self.turn += 1
        last = (action.words.split() or ["w3"])[-1]
        right = float(action.words.split().count("w5"))
        return Heard(words=f" {{last}} w7", done=self.turn == 3, reward=right)

    @property
    def state(self):
        return State(step_count=self.turn)


app = create_fastapi_app(Echo, Said, Heard, max_concurrent_envs=64)
uvicorn.run(app, host="127.0.0.1", port={port}, log_level="error")
"""


@pytest.fixture
def server(tmp_path):
    """An OpenEnv server on this machine; its address."""
    pytest.importorskip("openenv", reason="openenv-core is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    file = tmp_path / "server.py"
    file.write_text(SERVER.format(path=[path for path in sys.path if path], port=port))
    process = subprocess.Popen([sys.executable, str(file)])
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_episodes_on_an_openenv_server_are_those_of_the_same_world_here(server, tmp_path):
    from openenv.core import GenericEnvClient

    def there():
        client = GenericEnvClient(base_url=server).sync()
        return OpenEnvWorld(
            client,
            act=lambda text: {"words": text},
            see=lambda observation: observation["words"],
        )

    class Here:
        def seed(self, number):
            self.number = number % (1 << 31)

        def reset(self, **row):
            self.turn = 0
            return f" w{3 + self.number % 2}"

        def step(self, text):
            self.turn += 1
            words = text.split()
            return f" {(words or ['w3'])[-1]} w7", float(words.count("w5")), self.turn == 3

    models = loaded(save_model(tmp_path))
    over_http, in_process = (
        player(models, world).episodes(prompts(2), Draw(2), step=0, prompt_ids=range(2))
        for world in (there, Here)
    )
    for row, other in zip(over_http, in_process, strict=True):
        for one, same in zip(row, other, strict=True):
            assert one.failed is None
            assert one.messages == same.messages
            assert one.reward == same.reward
            for segment, expected in zip(one.segments, same.segments, strict=True):
                assert torch.equal(segment.ids, expected.ids)
                assert torch.equal(segment.mask, expected.mask)
