"""Flex attention: which blocks are computed, that trees stand end to end, that log-probs are those
of separate rows.
"""

import math

import pytest
import torch
from tiny_models import bundle, random_bundles, separate_logps, tiny_model
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from alignkit.batches import Plan
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.errors import ConfigError
from alignkit.policies.layout import block_mask, build_rows, micro_batches, visible
from alignkit.policies.load import load_pair
from alignkit.policies.module import PolicyModule
from alignkit.policies.pair import PolicyPair

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: flex attention has no backward on a CPU"
)


@pytest.fixture
def not_compiled(monkeypatch):
    """The same arithmetic without the quarter of a minute that compiling takes."""
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(
        WrappedFlexAttention, "_compiled_flex_attention", staticmethod(flex_attention)
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packing", [None, math.inf])
def test_blocks_hold_what_is_visible(window, packing):
    rows = build_rows(random_bundles(3, 4, 3, 9), "shared_prefix", packing=packing)
    count, length = rows.input_ids.shape
    assert count == (1 if packing else 4)
    seen = create_mask(block_mask(rows, window).mask_mod, count, None, length, length, device="cpu")
    assert torch.equal(seen, visible(rows, window))


def test_blocks_in_which_nothing_is_seen_are_left_out():
    """Trees of 256 and 200 tokens end to end: 128 x 128 blocks, three of four in each triangle,
    none across the trees.
    """
    bundles = [bundle([5] * n, [[6]]) for n in (256, 200)]
    kinds = block_mask(build_rows(bundles, "shared_prefix", packing=math.inf))
    assert kinds.to_dense()[0, 0].tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_groups_count_no_pads():
    bundles = [bundle([3] * 10, [[4] * n, [5] * n]) for n in (100, 4, 4)]
    tokens = 10 + 2 * 99 + 2 * 16
    assert micro_batches(bundles, tokens, "shared_prefix", packing=math.inf) == [[0, 1, 2]]
    assert len(micro_batches(bundles, tokens - 1, "shared_prefix", packing=math.inf)) == 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_log_probs_are_those_of_separate_rows(not_compiled, family, layout):
    bundles = random_bundles(2, 3, 3, 20)
    expected = separate_logps(tiny_model(family), bundles)
    model = tiny_model(family)
    model.set_attn_implementation("flex_attention")
    pair = PolicyPair(PolicyModule(model), None, {}, layout=layout)
    shapes = []
    pair.base.register_forward_pre_hook(
        lambda _, inputs: shapes.append(inputs[0].input_ids.shape[0])
    )
    found = pair.logps(bundles, Plan("pair", anchors=()))
    assert shapes == [1], "one row of all trees"
    torch.testing.assert_close(found.policy, expected, rtol=0, atol=1e-5)


def test_a_cpu_cannot_train_with_it():
    model = ModelConfig(name_or_path="task", attention="flex_attention")
    with pytest.raises(ConfigError, match="flex_attention cannot train on a CPU"):
        load_pair(model, ReferenceConfig(), None, Plan("pair"), fixed_data=True)


@needs_gpu
def test_gradients_on_a_gpu_are_those_of_sdpa():
    bundles, gradients = random_bundles(2, 3, 3, 200), []
    for kernel in ("sdpa", "flex_attention"):
        model = tiny_model("llama", hidden_size=64).cuda()
        model.set_attn_implementation(kernel)
        pair = PolicyPair(PolicyModule(model), None, {})
        pair.logps(bundles, Plan("pair", anchors=())).policy.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-3)
