"""What `make gpu` measures on: random models of Qwen3's shapes, a word tokenizer, random bundles. It
needs no file and no network.
"""

from functools import partial
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from alignkit.batches import Bundle
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig
from alignkit.policies.load import load_pair
from alignkit.rollout.hf import HFSampler
from alignkit.sources.rollouts import RolloutSource
from alignkit.sources.scoring import Scoring
from alignkit.training.optimizer import make_optimizer
from alignkit.training.reduction import Reducer

GPU = torch.cuda.is_available()
WIDE = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
SHAPES = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, **WIDE},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128, **WIDE},
}
VOCABULARY = {"tiny": 97, "0.6B": 151936, "1.7B": 151936}


def tokenizer_of(size):
    """A word for every token."""
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY[size])}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def model_of(size, device):
    """A random Qwen3 in float32, tied as the small ones are; computed under autocast on a GPU."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[size],
        vocab_size=VOCABULARY[size],
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def accelerator_of():
    return Accelerator(cpu=not GPU, mixed_precision="bf16" if GPU else "no")


class World:
    """One objective on one model: its pair, reducer and optimiser."""

    def __init__(self, size, objective, *, attention="auto", layout="auto", budget=16384):
        self.accelerator = accelerator_of()
        self.objective = objective
        device = self.accelerator.device
        model = ModelConfig(name_or_path="random", attention=attention, layout=layout)
        self.pair = load_pair(
            model,
            ReferenceConfig(kind="frozen"),
            None,
            objective.plan,
            device=device,
            fixed_data=False,
            live=(model_of(size, device), tokenizer_of(size)),
        )
        make = partial(make_optimizer, TrainConfig(learning_rate=1e-6))
        self.optimizer = self.pair.prepare(self.accelerator, make)
        self.reducer = Reducer(objective, self.pair, self.accelerator, budget, 1.0)

    def step(self, bundles):
        """One optimiser step; its metrics."""
        metrics = self.reducer.backward(bundles)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics

    def rollouts(self, prompts, completions, length):
        """Sampled and credited bundles of one rollout."""
        generator = torch.Generator().manual_seed(2)
        vocabulary = self.pair.vocab_size
        rows = [
            SimpleNamespace(
                ids=torch.randint(2, vocabulary, (length,), generator=generator),
                text=f"p{i}",
                uid=str(i),
                columns={},
            )
            for i in range(prompts)
        ]
        sampler = HFSampler(self.pair, max_new_tokens=length, seed=0)

        def reward(prompts, completions, **columns):
            return [sum(ids) % 7 / 7 for ids in columns["completion_ids"]]

        def decode(prompt, ids):
            return self.pair.tokenizer.decode(ids)

        source = RolloutSource(
            rows,
            self.objective,
            self.pair,
            sampler,
            Scoring(self.objective.plan, decode, reward, None),
            self.accelerator,
            batch_size=prompts,
            completions=completions,
            seed=0,
        )
        return source.collect(0)


def pairs_of(size, count, length):
    """Preference pairs of random tokens, prompt and completions of about `length` tokens."""
    generator = torch.Generator().manual_seed(1)

    def ids(low):
        n = int(torch.randint(low, length + 1, (1,), generator=generator))
        return torch.randint(2, VOCABULARY[size], (n,), generator=generator)

    bundles = []
    for i in range(count):
        completions = [ids(length // 2), ids(length // 2)]
        masks = [torch.ones(len(one), dtype=torch.bool) for one in completions]
        bundles.append(Bundle(ids(length // 2), completions, masks, str(i)))
    return bundles
