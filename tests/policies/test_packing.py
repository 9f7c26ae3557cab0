"""Rows of runs: how a tree is cut, what each run sees, when it pays, and that a step in them is the
step beside each other.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import bundle, random_bundles, tiny_model
from transformers import AutoModelForCausalLM

from alignkit.batches import Plan
from alignkit.policies import run_attention
from alignkit.policies.layout import build_rows, micro_batches, visible
from alignkit.policies.module import PolicyModule
from alignkit.policies.packing import (
    KERNEL,
    Run,
    RunMask,
    attend,
    default_budget,
    find_runs,
    kernel_of,
    pays,
    run_mask,
)
from alignkit.policies.pair import PolicyPair
from alignkit.policies.run_attention import joined

WIDE = 10**6


def test_runs_by_hand():
    """5 6 with branches 7 (then 4 or 8 9) and 3; and a second tree."""
    rows = build_rows(
        [bundle([5, 6], [[7, 4, 2], [7, 8, 9, 2], [3, 2]]), bundle([5], [[6, 2]])],
        "shared_prefix",
        packing=WIDE,
    )
    assert rows.input_ids.tolist() == [[5, 6, 3, 7, 4, 8, 9, 5, 6]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 3, 4, 0, 1]]
    assert rows.runs == (
        Run(2, ()),
        Run(1, (0,)),
        Run(1, (0,)),
        Run(1, (0, 2)),
        Run(2, (0, 2)),
        Run(2, ()),
    )
    assert [run.pairs(rows.runs) for run in rows.runs] == [4, 3, 3, 4, 10, 4]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_runs_see_what_the_whole_mask_says(layout, window):
    """Put together, the masks of the runs are `visible` of the packed row, which knows nothing of
    runs.
    """
    rows = build_rows(random_bundles(3, 4, 3, 9), layout, packing=WIDE)
    mask = run_mask(rows.runs, rows.position_ids[0], window)
    assert torch.equal(pairs_of(mask, rows.input_ids.shape[1]), visible(rows, window)[0, 0])


def pairs_of(mask: RunMask, length: int) -> torch.Tensor:
    """Which of the mask's queries sees which of `length` keys."""
    index = torch.arange(length)
    seen = torch.zeros(mask.stretches[-1].queries[1], length, dtype=torch.bool)
    for stretch in mask.stretches:
        keys = torch.cat([index[slice(*part)] for part in stretch.keys])
        queries = index[slice(*stretch.queries)]
        causal = torch.ones(len(queries), len(keys), dtype=torch.bool).tril()
        block = causal if stretch.bias is None else stretch.bias[0, 0] == 0
        seen[queries[:, None], keys] = block
    return seen


@pytest.mark.parametrize("window", [None, 3])
def test_queries_of_some_tokens_see_what_they_would_see_among_all(window):
    rows = build_rows(random_bundles(3, 4, 3, 9), "shared_prefix", packing=WIDE)
    read = rows.sources.unique()
    mask = run_mask(rows.runs, rows.position_ids[0], window, read)
    length = rows.input_ids.shape[1]
    assert torch.equal(mask.read, read)
    assert torch.equal(pairs_of(mask.last, length), visible(rows, window)[0, 0][read])


def test_when_keys_are_copied():
    assert joined([(0, 10), (12, 15)], 4) == ((0, 15),), "8 pairs too many, or 13 keys copied"
    assert joined([(0, 10), (10, 20), (900, 915)], 4) == ((0, 20), (900, 915))
    assert joined([(3, 5)], 1) == ((3, 5),)


@pytest.mark.parametrize("copied", [False, True])
def test_attention_of_runs_is_that_of_the_whole_mask(copied, monkeypatch):
    """Values and gradients in float64, with keys side by side and with the holes between them."""
    monkeypatch.setattr(run_attention, "COPY", 0 if copied else 10**6)
    rows = build_rows(random_bundles(3, 4, 3, 9), "shared_prefix", packing=WIDE)
    length = rows.input_ids.shape[1]
    mask = run_mask(rows.runs, rows.position_ids[0])
    assert any(len(stretch.keys) > 1 for stretch in mask.stretches) == copied
    made = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, 8, generator=made, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, length, 8, generator=made, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    weights = torch.randn(1, length, 4, 8, generator=made, dtype=torch.float64)

    module = torch.nn.Module()
    module.num_key_value_groups = 2
    found, _ = attend(module, *inputs, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=visible(rows)[0, 0], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for own, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)

    # What the kernel cannot do is left to transformers: here a dropout of everything.
    nothing, _ = attend(module, *inputs, mask, scaling=0.3, dropout=1.0)
    assert not nothing.any()


def test_when_it_pays():
    short, long = [Run(4, ())], [Run(400, ())]
    assert pays([short, long], 512), "396 pads at 512 wide"
    assert not pays([long, long], 512), "nothing is saved, and there is one more call"
    assert not pays([[Run(8, ())], [Run(4, ())]], 16), (
        "a narrow model does the pads faster than another call"
    )
    tree = [Run(256, ()), *[Run(64, (0,))] * 8]
    assert pays([tree], 512), "eight branches: most pairs of the whole row are masked"
    assert find_runs([0, 1, 2], [3, 3, 3]) == [Run(3, ())]


def test_groups_count_no_pads_where_rows_are_packed():
    bundles = [bundle([3] * 10, [[4] * n, [5] * n]) for n in (100, 4, 4, 4, 4, 4, 4)]
    budget = 10 + 2 * 99 + 6 * 16
    assert len(micro_batches(bundles, budget, "shared_prefix")) == 2
    assert micro_batches(bundles, budget, "shared_prefix", packing=512) == [[0, 1, 2, 3, 4, 5, 6]]


def test_a_pair_packs_if_all_its_models_can():
    # gemma2 attends by the eager kernel
    models = {name: tiny_model(name, hidden_size=512) for name in ("llama", "gemma2")}
    bundles = [bundle([3] * 4, [[5] * 90, [6] * 2]), bundle([3], [[7, 8], [9, 9]])]

    def packed(policy, **reference):
        pair = PolicyPair(PolicyModule(policy), None, reference)
        found = []
        pair.base.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].runs is not None)
        )
        pair.logps(bundles, Plan("pair", anchors=()))
        return found

    assert packed(models["llama"]) == [True]
    assert packed(models["gemma2"]) == [False]
    assert packed(tiny_model("llama", hidden_size=512, dtype=torch.bfloat16)) == [True]


def test_mixed_precision_packs():
    pair = PolicyPair(
        PolicyModule(tiny_model("llama", hidden_size=512, initializer_range=0.05)), None, {}
    )
    bundles = [bundle([3] * 4, [[5] * 90, [6] * 2]), bundle([3], [[7, 8], [9, 9]])]
    exact = pair.logps(bundles, Plan("pair", anchors=())).policy
    AcceleratorState._reset_state()  # other tests have had another precision
    pair.prepare(
        Accelerator(cpu=True, mixed_precision="bf16"),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    assert len(pair.micro_batches(bundles, 100)) == 1
    assert default_budget(pair.device, pair.packing) == 1024
    torch.testing.assert_close(
        pair.logps(bundles, Plan("pair", anchors=())).policy, exact, rtol=0, atol=0.02
    )
    AcceleratorState._reset_state()


def test_models_that_do_not_pack_count_pads():
    pair = PolicyPair(PolicyModule(tiny_model("llama")), None, {})  # narrow
    bundles = [bundle([3] * 4, [[5] * 90, [6] * 2]), bundle([3], [[7, 8], [9, 9]])]
    assert len(pair.micro_batches(bundles, 100)) == 2
    assert default_budget(pair.device, pair.packing) == 4096


def test_runs_attend_in_float32_inside_autocast():
    """Half-precision keys and queries give what float32 gives for the same numbers, rounded once at
    the end.
    """
    rows = build_rows([bundle([5, 6, 7], [[4] * 9, [8] * 7])], "shared_prefix", packing=WIDE)
    mask, module = run_mask(rows.runs, rows.position_ids[0]), torch.nn.Module()
    made = torch.Generator().manual_seed(0)
    half = [
        torch.randn(1, 2, rows.input_ids.shape[1], 8, generator=made).bfloat16() for _ in range(3)
    ]
    expected, _ = attend(module, *(tensor.float() for tensor in half), mask)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(module, *half, mask)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_generation_saving_and_recomputing_know_nothing_of_it(tmp_path):
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    taught = PolicyModule(model).model
    assert (taught.config._attn_implementation, kernel_of(taught.config)) == (KERNEL, "sdpa")
    assert torch.equal(taught(ids).logits, expected)
    padded = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    made = taught.generate(
        padded, attention_mask=(padded > 0).long(), max_new_tokens=3, do_sample=False
    )
    alone = taught.generate(
        padded[:1, 2:], attention_mask=torch.ones(1, 2), max_new_tokens=3, do_sample=False
    )
    assert made[0, 4:].tolist() == alone[0, 2:].tolist()
    taught.save_pretrained(tmp_path)
    assert KERNEL not in (tmp_path / "config.json").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    bundles, gradients = random_bundles(1, 3, 3, 9), []
    for recompute in (False, True):
        if recompute:
            taught.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        module = PolicyModule(taught).train()
        module.zero_grad()
        module(build_rows(bundles, "shared_prefix", packing=WIDE))["policy"].sum().backward()
        gradients.append(module.model.lm_head.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
