"""Episodes of several turns that a real vLLM draws: `make test-vllm`."""

from types import SimpleNamespace

import pytest
import torch
from test_real_vllm import train
from transformers import AutoTokenizer
from vllm_process import needs_vllm, vllm
from wide_heads import widened

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.files import read_jsonl
from alignkit.plan import Plan
from alignkit.policies.load import load_pair
from alignkit.rollout import VLLMSampler
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.renderer import TextRenderer
from alignkit.rollout.turns import TurnSampler
from alignkit.tasks import TASKS, resolve

pytestmark = [pytest.mark.slow, needs_vllm]
COLD = 0.02  # so cold that both engines draw the likeliest token, but for ties


class Corridor:
    """Three turns whatever is said; the shelf in view changes."""

    def reset(self, **columns):
        self.seen = 0

    def state(self):
        return f"door {self.seen}"

    def step(self, text):
        self.seen += 1
        return f" shelf {('left', 'middle', 'right')[self.seen % 3]}", 0.5 * self.seen, False


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = resolve("task:shop_small").model_folder
    return widened(folder, tmp_path_factory.mktemp("wide"), width=96)  # 16 times its heads of 6


@pytest.fixture(scope="module")
def url(model):
    with vllm(model) as (_, address):
        yield address


def player(sampler, tokenizer):
    return TurnSampler(
        sampler,
        LocalEnvironments(Corridor),
        TextRenderer(tokenizer, DataConfig()),
        turns=3,
        max_new_tokens=24,
        context=64,
        seed=0,
    )


def test_the_likeliest_episodes_are_those_of_the_transformers_engine(model, url):
    """The same tokens, masks, turns, states and rewards; log-probs up to rounding, which the low
    temperature multiplies.
    """
    pair = load_pair(
        ModelConfig(name_or_path=str(model)),
        ReferenceConfig(),
        None,
        Plan("rollout", anchors=()),
        fixed_data=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        SimpleNamespace(
            ids=torch.tensor(tokenizer(text)["input_ids"]), text=text, uid=text, columns={}
        )
        for text in TASKS["shop_small"].prompts
    ]
    config = RolloutConfig(url=url, max_new_tokens=24, temperature=COLD)
    samplers = [
        HFSampler(pair, max_new_tokens=24, temperature=COLD),
        VLLMSampler(pair, config, seed=0),
    ]
    played = []
    for sampler in samplers:
        sampler.sync()
        rows = player(sampler, tokenizer).episodes(
            prompts, Draw(4), step=0, prompt_ids=range(len(prompts))
        )
        played.append([episode for row in rows for episode in row])

    for episodes in played:
        assert all(episode.failed is None and episode.turns == 3 for episode in episodes)
    alike = [pair for pair in zip(*played, strict=True) if pair[0].messages == pair[1].messages]
    assert len(alike) >= len(played[0]) / 2  # the others hold a tie of two words
    for ours, theirs in alike:
        assert (theirs.ended, theirs.reward) == (ours.ended, ours.reward)
        for one, other in zip(ours.segments, theirs.segments, strict=True):
            for name in ("prompt", "ids", "mask", "turns", "states", "rewards"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert float((one.logps - other.logps).abs().max()) < 1e-4 / COLD


def test_a_run_on_episodes_learns_with_what_the_server_draws(model, url, tmp_path):
    """The trainer's log-probs of its own tokens are the server's: a mask or a position that is off
    by one would show in the mismatch at once.
    """
    settings = ["data.train=task:shop_small", "rollout.turns=4", "rollout.max_new_tokens=24"]
    code, err = train(model, tmp_path / "run", url, *settings, "train.steps=4")
    assert code == 0, err
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 4
    assert all(row["episodes/failed"] == 0 for row in rows)
    assert all(row["episodes/turns"] > 1 for row in rows)
    assert all(row["sampling/logp_difference_max"] < 1e-4 for row in rows)
