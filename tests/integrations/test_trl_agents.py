"""TRL's environments and tools beside ours: the same tokens, masks, rewards and counts of calls, and
the same losses where our objective trains in TRL's trainer. The models are Llamas in which the last
token alone says which one is next, so that what they write is known.
"""

import warnings
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version
from trl_world import COMMON

from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.online.grpo import GRPO
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.generate import OneModel
from alignkit.rollout.play import play

pytestmark = pytest.mark.skipif(
    Version(trl_version) < Version("1.16"),
    reason="TRL's environments have another form before 1.16",
)

CALL = ["<tool_call>", '{"name":', '"look",', '"arguments":', '{"shelf":', "2}}", "</tool_call>"]
SCENARIOS = {
    "a call": (CALL, ["milk"]),
    "a call that raises": ([*CALL[:5], "9}}", CALL[6]], ["bread", "milk"]),
    "a tool that is not there": ([*CALL[:2], '"take",', *CALL[3:]], ["bread"]),
    "a call that cannot be read": ([*CALL[:5], "</tool_call>"], ["milk"]),
    "no call": (["bread"], ["milk"]),
}
TOKENS = ["<pad>", "<unk>", "</s>", "user:", "assistant:", "then:", "tool:", *CALL]
TOKENS += ["9}}", '"take",', "milk", "bread", "0", "1"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }} </s> "
    "{% elif m.role == 'tool' %}tool: {{ m.content }} </s> "
    "{% else %}assistant: "
    "{{ 'then: ' if loop.index0 and messages[loop.index0 - 1].role == 'tool' else '' }}"
    "{{ m.content }} {% for call in m.tool_calls or [] %}<tool_call> "
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}} '
    "</tool_call> {% endfor %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{{ 'then: ' if messages[-1].role == 'tool' else '' }}{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"</s>\s*", "content": "text"},
    },
}


class Shelves:
    """In TRL's form; nothing of it is ours."""

    def reset(self, start, **row):
        self.total = start
        return f" {start}"

    def look(self, shelf: int) -> str:
        """Looks at a shelf.

        Args:
            shelf: which one
        """
        if shelf == 9:
            raise ValueError("no shelf")
        self.total += shelf
        return "milk bread"

    def get_reward(self):
        return float(self.total)


def look(shelf: int) -> str:
    """Looks at a shelf.

    Args:
        shelf: which one
    """
    return Shelves.look(Shelves(), shelf) if shelf == 9 else "bread"


def tokenizer():
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(TOKENS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    made.response_template = RESPONSE
    return made


def model(scenario, sure):
    """Writes the scenario's words; `sure` is the logit of the next token over sqrt(32)."""
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    first, second = SCENARIOS[scenario]
    with torch.no_grad():
        network.model.layers[0].self_attn.o_proj.weight.zero_()
        network.model.layers[0].mlp.down_proj.weight.zero_()
        network.model.embed_tokens.weight.copy_(torch.eye(len(TOKENS), 32))
        network.lm_head.weight.zero_()
        for words in (["assistant:", *first, "</s>"], ["then:", *second, "</s>"]):
            for word, follows in pairwise(words):
                network.lm_head.weight[TOKENS.index(follows), TOKENS.index(word)] = sure
    return network


ROWS = [{"prompt": [{"role": "user", "content": "milk"}], "start": start} for start in (0, 1)]


class Seeing(GRPOTrainer):
    """Remembers the rollout."""

    def _generate_and_score_completions(self, inputs):
        self.rollout = super()._generate_and_score_completions(inputs)
        return self.rollout


def trainer(cls, network, out, steps=1, **further):
    settings = {**COMMON, "max_steps": steps, "per_device_train_batch_size": 4}
    args = GRPOConfig(
        output_dir=str(out),
        **settings,
        num_generations=2,
        max_completion_length=40,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            model=network,
            args=args,
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list(ROWS),
            **further,
        )


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("form", ["environment", "tools"])
def test_tokens_masks_and_rewards_are_trls(scenario, form, tmp_path):
    if form == "environment":
        worlds = LocalEnvironments(Shelves)
        further = {"environment_factory": Shelves}
    else:
        worlds = LocalEnvironments(None, [look])
        further = {
            "tools": [look],
            "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions],
        }
    theirs = trainer(Seeing, model(scenario, 10.0), tmp_path, **further)
    theirs.train()
    rollout = theirs.rollout

    ours = play(
        OneModel(model(scenario, 10.0), tokenizer()),
        [row["prompt"] for row in ROWS],
        worlds,
        rows=[{"start": row["start"]} for row in ROWS],
        completions=2,
        max_new_tokens=40,
    )
    episodes = [episode for row in ours for episode in row]
    own = rollout.get("tool_mask", torch.ones_like(rollout["completion_mask"])).bool()
    for number, episode in enumerate(episodes):
        (segment,) = episode.segments
        real = rollout["completion_mask"][number].bool()
        before = rollout["prompt_mask"][number].bool()
        assert segment.prompt.tolist() == rollout["prompt_ids"][number][before].tolist()
        assert segment.ids.tolist() == rollout["completion_ids"][number][real].tolist()
        assert segment.mask.tolist() == own[number][real].tolist()

    logged = theirs.state.log_history[0]
    calls = sum(episode.calls for episode in episodes)
    failures = sum(episode.failures for episode in episodes)
    assert logged["tools/call_frequency"] == calls / len(episodes)
    assert logged["tools/failure_frequency"] == (failures / calls if calls else 0)
    rewards = [
        episode.reward if form == "environment" else len(episode.messages) for episode in episodes
    ]
    assert logged["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
    assert calls == (0 if scenario in ("no call", "a call that cannot be read") else 4)


def test_our_objective_trains_on_trls_episodes_as_trls_own_does(tmp_path):
    """The models are unsure here: episodes differ inside a group, and some calls fail."""
    losses = []
    for cls in (GRPOTrainer, as_trl_trainer(GRPO(beta=0.0), base=GRPOTrainer)):
        made = trainer(cls, model("a call", 1.1), tmp_path, steps=3, environment_factory=Shelves)
        made.train()
        logged = made.state.log_history[:3]
        losses.append([(row["loss"], row["grad_norm"], row["reward"]) for row in logged])
        assert any(row["tools/call_frequency"] > 0 for row in logged)
    assert any(abs(grad) > 1e-3 for _, grad, _ in losses[0])
    for native, own in zip(*losses, strict=True):
        assert own == pytest.approx(native, abs=1e-5)
