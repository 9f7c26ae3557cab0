"""Text in, text out, on a model saved with its tokenizer; the mixture on a real pair with a LoRA
policy.
"""

import pytest
import torch
from small_models import next_logits, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alignkit.batches import Draw, Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.errors import ConfigError
from alignkit.policies.load import load_pair
from alignkit.rollout import HFSampler, OneModel
from alignkit.rollout.generate import generate, prompt_ids

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"


def small_tokenizer():
    words = {"</s>": 0, "<s>": 1, "a": 2, "b": 3, "user": 4, "assistant": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="b"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        bos_token="<s>",
        pad_token="<s>",
        unk_token="b",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model(vocab=6, seed=1).save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


def test_generate_gives_texts_without_special_tokens_and_repeats_itself(folder):
    one = OneModel(AutoModelForCausalLM.from_pretrained(folder), small_tokenizer())
    one.network.train()
    texts = generate(one, ["a b", "b a a"], completions=3, max_new_tokens=5, seed=1)
    assert [len(row) for row in texts] == [3, 3]
    assert set(" ".join(text for row in texts for text in row).split()) <= {
        "a",
        "b",
        "user",
        "assistant",
    }
    assert texts == generate(one, ["a b", "b a a"], completions=3, max_new_tokens=5, seed=1)
    assert texts != generate(one, ["a b", "b a a"], completions=3, max_new_tokens=5, seed=2)
    assert one.network.training
    with pytest.raises(ConfigError, match="at least 1"):
        generate(one, ["a"], completions=0)


def test_as_many_new_tokens_as_the_context_leaves(folder):
    """The context is 64: beside a prompt of 60 there is room for 4, and a number that is given is
    not lowered.
    """
    one, long = (
        OneModel(AutoModelForCausalLM.from_pretrained(folder), small_tokenizer()),
        " ".join("a" * 60),
    )
    assert generate(one, [long], temperature=0) == generate(
        one, [long], temperature=0, max_new_tokens=4
    )
    with pytest.raises(
        ConfigError, match="60 tokens and 64 new tokens exceed the model's context of 64"
    ):
        generate(one, [long], max_new_tokens=64)


def test_prompts_become_ids():
    tokenizer = small_tokenizer()
    assert prompt_ids("a b", tokenizer).tolist() == [2, 3]
    assert prompt_ids("", tokenizer).tolist() == [1]
    assert prompt_ids("a </s>", tokenizer).tolist() == [2]
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(ConfigError, match="chat template"):
        prompt_ids(chat, tokenizer)
    tokenizer.chat_template = CHAT
    assert prompt_ids(chat, tokenizer).tolist() == [4, 2, 5]


def test_the_reference_half_of_a_lora_mixture_is_the_base_model(folder):
    """Not the base model with the adapter's layers still active: then the mixture would be the
    policy itself.
    """
    model = ModelConfig(name_or_path=str(folder), adapter=AdapterConfig(r=4, alpha=8))
    pair = load_pair(
        model, ReferenceConfig(kind="adapter_off"), None, Plan("game"), fixed_data=False
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in pair.parameters():
            parameter.normal_()
    base, prompt = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor([2, 3, 3])
    sampled = HFSampler(pair, max_new_tokens=4).sample(
        [prompt], Draw(20, weights={"policy": 0.6, "reference": 0.4}), step=0, prompt_ids=[0]
    )[0]
    gaps = []
    for sample in sampled:
        ids = prompt.tolist()
        for token, logp in zip(sample.ids.tolist(), sample.logps.tolist(), strict=True):
            with pair.model("policy") as policy:
                adapted = next_logits(policy, ids)
            mixture = (0.6 * adapted + 0.4 * next_logits(base, ids)).log_softmax(-1)
            assert abs(float(mixture[token]) - logp) < 1e-5
            gaps.append(abs(float(adapted.log_softmax(-1)[token]) - logp))
            ids.append(token)
    assert max(gaps) > 0.1  # the adapter is not idle, so a leak would show
