"""The chunked head against the model's own logits; what it keeps in memory."""

from itertools import accumulate

import pytest
import torch
from tiny_models import random_bundles, separate_logps, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.losses import pld_loss
from alignkit.objectives.distillation.teacher_base import teacher_statistic
from alignkit.objectives.vocabulary_divergences import NAMES
from alignkit.policies import head as head_file
from alignkit.policies.head import AnchorStates, Head, head_figures
from alignkit.policies.layout import build_rows
from alignkit.policies.module import PolicyModule
from alignkit.risk import risk_ratio


def kl(logps, anchor, labels):
    return (logps.exp() * (logps - anchor)).sum(-1)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "llama"])
def test_log_probs_are_those_of_the_models_logits(name):
    model, bundles = tiny_model(name, dtype=torch.float64), random_bundles(1)
    rows = build_rows(bundles, "padded")
    logps = rows.scatter(PolicyModule(model)(rows)["policy"])
    # rotary angles and norms are float32 in some models
    torch.testing.assert_close(logps, separate_logps(model, bundles), rtol=0, atol=1e-5)


def problem(tokens: int = 23, vocab: int = 17, width: int = 6):
    torch.manual_seed(0)
    module, other = (nn.Linear(width, vocab, bias=True, dtype=torch.float64) for _ in range(2))
    hidden, states = (torch.randn(tokens, width, dtype=torch.float64) for _ in range(2))
    return (
        Head(module, scale=1.7, soft_cap=2.0),
        hidden.requires_grad_(),
        torch.randint(vocab, (tokens,)),
        AnchorStates(states, Head(other)),
    )


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 23, 100])
def test_figures_and_gradients_do_not_depend_on_the_chunks(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(head_file, "chunk_rows", lambda *_: rows_per_chunk)
    head, hidden, labels, anchor = problem()
    figures = head_figures(head, hidden, labels, {"kl": kl}, anchor, partition=True)
    weights = torch.linspace(-1, 1, len(labels), dtype=torch.float64)
    inputs = [hidden, head.module.weight, head.module.bias]
    loss = (figures["policy"] * weights + figures["kl"] * weights.flip(0)).sum()
    loss = loss + (figures["log_partition"] * weights**2).sum()
    found = torch.autograd.grad(loss, inputs)

    logits = 2.0 * torch.tanh(1.7 * head.module(hidden) / 2.0)
    logps = logits.log_softmax(-1)
    anchored = anchor.head.module(anchor.hidden).log_softmax(-1)
    picked = logps.gather(-1, labels[:, None])[:, 0]
    expected_kl = torch.nn.functional.kl_div(
        anchored, logps, log_target=True, reduction="none"
    ).sum(-1)
    whole = (picked * weights + expected_kl * weights.flip(0)).sum()
    whole = whole + (logits.logsumexp(-1) * weights**2).sum()
    expected = torch.autograd.grad(whole, inputs)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(figures["policy"], picked, **close)
    torch.testing.assert_close(figures["kl"], expected_kl, **close)
    torch.testing.assert_close(figures["log_partition"], logits.logsumexp(-1), **close)
    torch.testing.assert_close(
        figures["entropy"], torch.distributions.Categorical(logits=logits).entropy(), **close
    )
    torch.testing.assert_close(
        figures["anchor"], anchored.gather(-1, labels[:, None])[:, 0], **close
    )
    assert not figures["entropy"].requires_grad
    assert not figures["anchor"].requires_grad
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows_per_chunk", [5, 6, 100])  # of 23 tokens: 5, 4 and 1 chunks
def test_few_chunks_are_kept_for_backward_and_many_computed_again(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(head_file, "chunk_rows", lambda *_: rows_per_chunk)
    head, hidden, labels, _ = problem()
    passes = []
    head.module.register_forward_hook(lambda *_: passes.append(1))
    inputs, weights = (
        [hidden, head.module.weight, head.module.bias],
        torch.linspace(-1, 1, len(labels), dtype=torch.float64),
    )
    loss = (head_figures(head, hidden, labels, {})["policy"] * weights).sum()
    found = torch.autograd.grad(loss, inputs, retain_graph=True)
    chunks = -(-len(labels) // rows_per_chunk)
    assert len(passes) == (chunks if chunks <= 4 else 2 * chunks)
    for one, other in zip(
        found, torch.autograd.grad(loss, inputs), strict=True
    ):  # nothing is kept for a second time
        assert torch.equal(one, other)
    picked = (
        (2.0 * torch.tanh(1.7 * head.module(hidden) / 2.0))
        .log_softmax(-1)
        .gather(-1, labels[:, None])[:, 0]
    )
    for one, other in zip(
        found, torch.autograd.grad((picked * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    passes.clear()
    with torch.no_grad():
        head_figures(head, hidden, labels, {})
    assert len(passes) == chunks


def test_impossible_tokens():
    """A logit of -inf takes no probability and no entropy; nothing becomes NaN."""
    head, hidden, labels, _ = problem()
    with torch.no_grad():
        head.module.bias[3] = -torch.inf
    uncapped = Head(head.module)
    labels = torch.where(labels == 3, 4, labels)
    figures = head_figures(uncapped, hidden, labels, {})
    figures["policy"].sum().backward()
    assert all(bool(v.isfinite().all()) for v in figures.values())
    assert bool(hidden.grad.isfinite().all())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor made, in bytes and in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_matrix_of_all_tokens_and_no_wide_copy_of_the_weights(monkeypatch):
    """bfloat16 weights [V, H]: the float32 tensors of a step are chunks [C, V], however many tokens
    there are.
    """
    vocab, width, chunk = 512, 256, 16
    monkeypatch.setattr(head_file, "chunk_rows", lambda *_: chunk)
    module = nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16)
    for tokens in (64, 256):
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        with Largest() as largest:
            figures = head_figures(Head(module), hidden, torch.randint(vocab, (tokens,)), {})
            figures["policy"].sum().backward()
        assert largest.elements == chunk * vocab


def test_one_chunk_of_each_model_is_alive_at_a_time(monkeypatch):
    """Storages of the log-probs that a statistic over both models was given: all gone when it is
    given the next chunk's.
    """
    monkeypatch.setattr(head_file, "chunk_rows", lambda *_: 3)
    monkeypatch.setattr(head_file, "PARTS", {"cpu": 1})
    torch.manual_seed(0)
    policy, reference = (nn.Linear(5, 33, bias=False) for _ in range(2))
    calls: list[tuple[StorageWeakRef, StorageWeakRef]] = []

    def cvar(logps, anchor, labels):
        assert all(old.expired() for chunk in calls for old in chunk), f"call {len(calls)}"
        calls.append(
            (StorageWeakRef(logps.untyped_storage()), StorageWeakRef(anchor.untyped_storage()))
        )
        return risk_ratio(logps, anchor, risk="cvar", level=0.9)

    hidden, labels = torch.randn(11, 5, requires_grad=True), torch.randint(33, (11,))
    anchor = AnchorStates(torch.randn(11, 5), Head(reference))
    head_figures(Head(policy), hidden, labels, {"risk": cvar}, anchor)["risk"].sum().backward()
    assert len(calls) == 2 * 4  # forward and backward, four chunks each
    assert all(old.expired() for chunk in calls for old in chunk)


def peak_bytes(job):
    """The most that tensors made inside `job` take at a time."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(profile_memory=True, activities=[cpu]) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_a_teachers_statistics_take_two_more_chunks_than_the_likelihood(monkeypatch):
    chunk, vocab, tokens = 32, 512, 160
    monkeypatch.setattr(head_file, "chunk_rows", lambda *_: chunk)
    monkeypatch.setattr(head_file, "SMALLEST_PART", 0)
    torch.manual_seed(0)
    policy, teacher = (nn.Linear(4, vocab, bias=False) for _ in range(2))
    hidden, labels = torch.randn(tokens, 4, requires_grad=True), torch.randint(vocab, (tokens,))
    states = torch.randn(tokens, 4)

    def step(statistics, anchor=None):
        results = head_figures(Head(policy), hidden, labels, statistics, anchor)
        (sum(results[n] for n in statistics) if statistics else results["policy"]).sum().backward()

    step({})  # gradients are there from here on
    plain = peak_bytes(lambda: step({}))
    statistics = {name: teacher_statistic(divergence=name) for name in NAMES}
    statistics["pld"] = pld_loss
    for name, statistic in statistics.items():
        live = AnchorStates(states, Head(teacher.requires_grad_(False)))
        peak = peak_bytes(lambda s=statistic, a=live: step({"d": s}, a))
        assert peak <= plain + 2 * chunk * vocab * 4, name


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_statistics_do_not_depend_on_the_parts_of_a_chunk(monkeypatch, parts):
    monkeypatch.setattr(head_file, "PARTS", {"cpu": parts})
    monkeypatch.setattr(head_file, "SMALLEST_PART", 0)
    torch.manual_seed(0)
    policy, teacher = (nn.Linear(5, 33, bias=False) for _ in range(2))
    hidden, labels = torch.randn(7, 5, requires_grad=True), torch.randint(33, (7,))
    states, weights = torch.randn(7, 5), torch.randn(7)
    laws = [(head(x) * 1.0).log_softmax(-1) for head, x in ((policy, hidden), (teacher, states))]
    statistic = teacher_statistic(divergence="jsd", beta=0.3)
    expected = statistic(laws[0], laws[1].detach(), labels)
    gradients = torch.autograd.grad((expected * weights).sum(), [hidden, policy.weight])

    anchor = AnchorStates(states, Head(teacher))
    both = {"d": statistic, "anchor_only": lambda ours, theirs, labels: theirs[:, 0]}
    results = head_figures(Head(policy), hidden, labels, both, anchor)
    torch.testing.assert_close(results["d"], expected, rtol=0, atol=1e-6)
    total = (results["d"] * weights).sum() + results["anchor_only"].sum()
    for own, other in zip(torch.autograd.grad(total, [hidden, policy.weight]), gradients):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
