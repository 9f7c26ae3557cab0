"""Both layouts against each completion by itself through `model(ids).logits`: log-probs and
gradients, on six architectures.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, bundle, random_bundles, separate_logps, tiny_model

from alignkit.policies.layout import build_rows
from alignkit.policies.module import PolicyModule, causal_lm
from alignkit.policies.packing import KERNEL

LAYOUTS = ("shared_prefix", "padded")
WIDE = 10**6  # a width at which every pad that is saved pays
BRANCHING = ["llama", "qwen3", "gemma3", "mistral", "gpt2", "gemma2"]
cached_models: dict[str, torch.nn.Module] = {}


def double(name: str) -> torch.nn.Module:
    """One float64 model per architecture for the whole file."""
    if name not in cached_models:
        cached_models[name] = tiny_model(name, dtype=torch.float64)
    return cached_models[name]


def weights(bundles, dtype=torch.float64) -> torch.Tensor:
    """Arbitrary weights of each token in a loss, [N, T]."""
    longest = max(len(ids) for b in bundles for ids in b.completions)
    count = sum(len(b.completions) for b in bundles)
    return torch.linspace(-1, 1, count * longest, dtype=dtype).view(count, longest)


def gradients(module: torch.nn.Module, logps: torch.Tensor, bundles) -> dict[str, torch.Tensor]:
    module.zero_grad()
    (logps * weights(bundles, logps.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def check(model, bundles, *, atol: float, oracle=None) -> None:
    """Log-probs and gradients of both layouts against the oracle."""
    module = PolicyModule(model)
    expected = separate_logps(oracle or model, bundles)
    reference = gradients(model, expected, bundles)
    for layout, packing in itertools.product(
        LAYOUTS, {None, WIDE if causal_lm(model).config._attn_implementation == KERNEL else None}
    ):
        rows = build_rows(bundles, layout, packing=packing)
        logps = rows.scatter(module(rows)["policy"])
        torch.testing.assert_close(logps, expected, rtol=0, atol=atol)
        found = gradients(model, logps, bundles)
        assert found.keys() == reference.keys()
        largest = max(float(g.abs().max()) for g in reference.values())
        for name, gradient in reference.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=atol * max(1.0, largest), msg=f"{layout} {name}"
            )


shapes = st.tuples(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 24))


@pytest.mark.parametrize("name", BRANCHING)
@settings(max_examples=8, deadline=None)
@given(shape=shapes)
def test_layouts_agree_with_separate_rows(name, shape):
    """Float64 leaves rounding alone: 2e-6, because rotary angles and norms are computed in float32
    in some models (Gemma 2 differs by 1.2e-6 on some shapes).
    """
    seed, count, completions, longest = shape
    bundles = random_bundles(seed, count, completions, longest)
    if not any(b.n_trained for b in bundles):
        return
    check(double(name), bundles, atol=2e-6)


@pytest.mark.parametrize("name", BRANCHING)
def test_layouts_agree_in_float32(name):
    check(tiny_model(name, initializer_range=0.1), random_bundles(1, 3, 3, 20), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_token_completions(name):
    bundles = [bundle([5, 6, 7], [[8], [9], [10]]), bundle([4], [[3], [3]])]
    rows = build_rows(bundles, "shared_prefix")
    assert rows.input_ids.shape[1] == 3, "no input token is needed for a completion of one token"
    check(double(name), bundles, atol=1e-6)


def test_lora():
    model = get_peft_model(
        tiny_model("llama", dtype=torch.float64),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    check(model.double(), random_bundles(4), atol=1e-6)


def test_lora_on_the_head():
    targets = ["q_proj", "lm_head"]
    model = get_peft_model(
        tiny_model("llama", dtype=torch.float64),
        LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    )
    check(model.double(), random_bundles(4), atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing(adapter):
    model = tiny_model("qwen3", dtype=torch.float64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).double()
    check(model.train(), random_bundles(5), atol=1e-6)


def test_tied_embeddings_get_both_gradients():
    model = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(model, random_bundles(6), atol=1e-6)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_are_needed(name):
    """What the masks per layer type are for: without the window the log-probs are wrong."""
    model, bundles = double(name), random_bundles(1, 2, 2, 20)
    module = PolicyModule(model)
    module.windows = dict.fromkeys(module.windows)
    rows = build_rows(bundles, "shared_prefix")
    assert rows.branched
    assert (rows.scatter(module(rows)["policy"]) - separate_logps(model, bundles)).abs().max() > 0.1


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"bloom", "llama4"}))
def test_bfloat16_weights_give_float32_figures(name):
    model, bundles = (
        tiny_model(name, initializer_range=0.1, dtype=torch.bfloat16),
        random_bundles(2, 2),
    )
    rows = build_rows(bundles, "shared_prefix")
    logps = PolicyModule(model)(rows)["policy"]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(
        rows.scatter(logps), separate_logps(model, bundles), rtol=0, atol=0.1
    )
    exact = PolicyModule(model.float())(rows)["policy"]  # the same weights
    torch.testing.assert_close(logps, exact, rtol=0, atol=5e-2)


def test_values_come_from_the_states_before_the_tokens():
    model, bundles = double("llama"), random_bundles(7, 2)
    module = PolicyModule(model, values=True).double()
    with torch.no_grad():
        module.value_head.weight.copy_(torch.linspace(-1, 1, 32))
        module.value_head.bias.fill_(0.5)
    rows = build_rows(bundles, "shared_prefix")
    values = rows.scatter(module(rows)["values"])
    b = bundles[0]
    states = model.model(torch.cat([b.prompt, b.completions[0]])[None]).last_hidden_state[
        0, len(b.prompt) - 1 : -1
    ]
    expected = torch.where(b.masks[0], module.value_head(states)[:, 0], 0.0)
    torch.testing.assert_close(values[0, : len(expected)], expected, rtol=0, atol=1e-6)


def test_rows_without_a_trained_token_touch_every_parameter():
    module = PolicyModule(tiny_model("llama"), values=True)
    figures = module(build_rows([bundle([5, 6], [[7, 8]], [[False, False]])], "shared_prefix"))
    (figures["policy"].sum() + figures["values"].sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
