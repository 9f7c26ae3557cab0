"""Tiny random models and bundles for the tests of the policies."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.batches import Bundle, Plan
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair
from alignkit.policies.teacher import add_teacher

VOCAB = 61
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOW = 5
MODELS = {
    "llama": {"model_type": "llama", **SHAPE},
    "qwen3": {"model_type": "qwen3", **SHAPE},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **SHAPE,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "mistral": {"model_type": "mistral", **SHAPE, "sliding_window": WINDOW},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": {
        "model_type": "gemma2",
        **SHAPE,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_implementation": "eager",
    },
    "cohere": {
        "model_type": "cohere",
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        "logit_scale": 4.0,
    },
    "bloom": {
        "model_type": "bloom",
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "attn_implementation": "eager",
    },
    "llama4": {
        "model_type": "llama4_text",
        **SHAPE,
        "attention_chunk_size": 6,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "no_rope_layers": [1, 1],
        "layer_types": ["chunked_attention", "chunked_attention"],
        "use_qk_norm": True,
    },
    "granite": {
        "model_type": "granite",
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        "logits_scaling": 0.25,
    },
}


def tiny_model(
    name: str, seed: int = 0, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, **changes
):
    """A random two-layer model of a family, weights large enough that attention matters."""
    settings = {**MODELS[name], "vocab_size": vocab, "initializer_range": 0.3, **changes}
    attention = settings.pop("attn_implementation", "sdpa")
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, **tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (
            AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
        )


def bundle(
    prompt: list[int], completions: list[list[int]], masks: list[list[bool]] | None = None, **fields
) -> Bundle:
    """A bundle from lists; everything is trained unless masks say otherwise."""
    masks = masks or [[True] * len(ids) for ids in completions]
    return Bundle(
        torch.tensor(prompt),
        [torch.tensor(ids, dtype=torch.int64) for ids in completions],
        [torch.tensor(m, dtype=torch.bool) for m in masks],
        **fields,
    )


def random_bundles(
    seed: int, count: int = 4, completions: int = 2, longest: int = 12, vocab: int = VOCAB
) -> list[Bundle]:
    """Bundles with random tokens, lengths, holes in the masks, and completions that begin alike."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(
            3, vocab, (int(torch.randint(low, high + 1, (1,), generator=rng)),), generator=rng
        ).tolist()

    out = []
    for _ in range(count):
        begin = ids(0, 2)
        texts = [begin + ids(1, longest) for _ in range(completions)]
        masks = [[bool(x) for x in torch.rand(len(t), generator=rng) > 0.25] for t in texts]
        out.append(bundle(ids(1, longest), texts, masks))
    return out


def separate_logps(model, bundles: list[Bundle], statistic=None) -> torch.Tensor:
    """The oracle: each completion by itself through `model(ids).logits`, [N, T] and 0 outside the
    masks.
    """
    longest = max(len(ids) for b in bundles for ids in b.completions)
    rows = []
    for b in bundles:
        for ids, mask in zip(b.completions, b.masks):
            logits = model(torch.cat([b.prompt, ids])[None]).logits[0]
            logits = logits[len(b.prompt) - 1 : -1]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            values = (
                logps.gather(-1, ids[:, None])[:, 0] if statistic is None else statistic(logps, ids)
            )
            rows.append(
                torch.nn.functional.pad(torch.where(mask, values, 0.0), (0, longest - len(ids)))
            )
    return torch.stack(rows)


def write_model(
    folder,
    name: str = "llama",
    seed: int = 0,
    vocab: int = VOCAB,
    tokens: int | None = None,
    **changes,
):
    """A tiny model with a word tokenizer (`w3 w4 ...`) on disk; `tokens` is the tokenizer's size
    where it differs.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tokens or vocab)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    tiny_model(name, seed, vocab, **changes).save_pretrained(folder)
    return str(folder)


def write_padded(folder, seed, vocab):
    """A model whose embedding has more rows than the tokenizer; it makes the further ones unlikely."""
    write_model(folder, seed=seed, vocab=vocab, tokens=VOCAB)
    model = tiny_model("llama", seed, vocab)
    with torch.no_grad():
        # The first channel stays large and positive, so that a head can lower a logit everywhere.
        model.model.embed_tokens.weight[:, 0] = 30.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[VOCAB:, 0] = -30.0
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_teacher(student: Path, teacher: Path, plan: Plan) -> PolicyPair:
    """The pair of the models in two folders."""
    model = ModelConfig(name_or_path=str(student))
    pair = load_pair(model, ReferenceConfig(), None, plan, fixed_data=True)
    add_teacher(pair, TeacherConfig(name_or_path=str(teacher)), model)
    return pair
