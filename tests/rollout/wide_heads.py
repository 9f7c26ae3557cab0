"""The same Llama with wider attention heads: vLLM's CPU kernels start at 32, the embedded task's
heads have 16.
"""

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM


def widened(folder, out, width=32):
    """Write the model of `folder` with heads of `width`, a multiple of its own, into `out`; its
    log-probs are the same up to rounding.

    New dimensions are zero. A pair (i, i + d/2) that RoPE turns by theta^(-2i/d) moves to where the
    wider head has the same angle, and queries grow by sqrt(width / d), which the softmax divides
    by.
    """
    old = LlamaForCausalLM.from_pretrained(folder)
    config, state = AutoConfig.from_pretrained(folder), old.state_dict()
    size, step = config.head_dim, width // config.head_dim
    half = torch.arange(size // 2) * step
    places = torch.cat([half, half + width // 2])

    def rows(weight, heads, scale=1.0):
        wide = weight.new_zeros(heads, width, weight.shape[1])
        wide[:, places] = scale * weight.view(heads, size, -1)
        return wide.flatten(0, 1)

    for name, value in state.items():
        if "q_proj" in name:
            state[name] = rows(value, config.num_attention_heads, step**0.5)
        elif "k_proj" in name or "v_proj" in name:
            state[name] = rows(value, config.num_key_value_heads)
        elif "o_proj" in name:
            state[name] = rows(value.T, config.num_attention_heads).T.contiguous()
    config.head_dim = width
    new = LlamaForCausalLM(config)
    new.load_state_dict(state)
    new.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    ids = torch.arange(2, config.vocab_size)[None, :40]
    with torch.no_grad():
        assert float((old(ids).logits - new(ids).logits).abs().max()) < 1e-4
    return out
