"""Tiny random models for the sampler's tests, and their distributions by enumeration."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM

EOS = 0
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
FAMILIES = {
    "llama": {"model_type": "llama", **SHAPE},
    "mistral": {"model_type": "mistral", **SHAPE, "sliding_window": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        **SHAPE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 4,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 16, "n_layer": 2, "n_head": 4},
}

# Models with a state instead of, or beside, keys and values.
STATEFUL = {
    "mamba": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 4,
        "n_groups": 1,
        "expand": 2,
    },
    "falcon_mamba": {
        "model_type": "falcon_mamba",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
    },
    "jamba": {
        "model_type": "jamba",
        **{name: size for name, size in SHAPE.items() if name != "head_dim"},
        "num_experts": 2,
        "mamba_d_state": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        **SHAPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "rwkv": {"model_type": "rwkv", "hidden_size": 16, "num_hidden_layers": 2},
}


def small_model(family: str = "llama", vocab: int = 4, seed: int = 0, **changes):
    """A random model whose next-token distribution depends visibly on every token before."""
    settings = {
        "max_position_embeddings": 64,
        **{**FAMILIES, **STATEFUL}[family],
        "vocab_size": vocab,
        "initializer_range": 0.5,
        "init_std": 0.5,
    }
    config = AutoConfig.for_model(
        **{**settings, **changes}, bos_token_id=1, eos_token_id=EOS, pad_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def models_of(policy, reference=None, **others):
    """The `Models` that a sampler wants."""
    named = {"policy": policy, "reference": reference, **others}
    return SimpleNamespace(
        model=lambda name: nullcontext(named[name]),
        together=nullcontext,
        tokenizer=SimpleNamespace(eos_token_id=EOS),
    )


@torch.no_grad()
def next_logits(model, ids: list[int]) -> torch.Tensor:
    """Logits [V] after `ids`, one row, no padding, no cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def enumerate_completions(logprobs, prompt: list[int], cap: int) -> dict[tuple[int, ...], float]:
    """Every completion of at most `cap` tokens with its probability; `logprobs(ids)` gives the next
    token's [V].
    """
    vocab, found, open_ = None, {}, [((), 0.0)]
    for _ in range(cap):
        longer = []
        for ids, logp in open_:
            row = logprobs([*prompt, *ids]).tolist()
            vocab = len(row)
            for token in range(vocab):
                target = found if token == EOS else None
                if target is not None:
                    target[(*ids, token)] = logp + row[token]
                else:
                    longer.append(((*ids, token), logp + row[token]))
        open_ = longer
    found |= dict(open_)
    return {
        ids: float(torch.tensor(logp, dtype=torch.float64).exp()) for ids, logp in found.items()
    }


def p_value(samples, expected: dict) -> float:
    """Chi-square of the sampled completions against exact probabilities; cells expected less than 5
    times are pooled.
    """
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        counts[tuple(sample.ids.tolist())] += 1  # a KeyError is a completion that cannot be
    big = [ids for ids, p in expected.items() if p * len(samples) >= 5]
    observed, wanted = [counts[i] for i in big], [expected[i] * len(samples) for i in big]
    rest = len(samples) - sum(wanted)
    if rest > 5:
        observed, wanted = [*observed, len(samples) - sum(observed)], [*wanted, rest]
    scale = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [w * scale for w in wanted]).pvalue)
