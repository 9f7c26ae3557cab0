"""The transformers engine: right distribution, recorded log-probs, independence of batching, ends
and caps.
"""

import pytest
import torch
from small_models import (
    EOS,
    FAMILIES,
    enumerate_completions,
    models_of,
    next_logits,
    p_value,
    small_model,
)

from alignkit.batches import Draw
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, DataError, ModelError, NumericsError
from alignkit.rollout import HFSampler, make_sampler
from alignkit.rollout.cache_probe import sampling_model

PROMPTS = [torch.tensor(ids) for ids in ([1, 2], [3, 1, 2, 3, 1, 1, 2], [2, 2, 3, 1], [1])]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_samples_follow_the_enumerated_distribution(family):
    model = small_model(family)
    drawn = HFSampler(models_of(model), max_new_tokens=3, token_budget=3000).sample(
        PROMPTS, Draw(2500), step=1, prompt_ids=range(4)
    )
    for prompt, samples in zip(PROMPTS, drawn, strict=True):
        exact = enumerate_completions(
            lambda ids: next_logits(model, ids).log_softmax(-1), prompt.tolist(), 3
        )
        assert abs(sum(exact.values()) - 1) < 1e-9
        assert p_value(samples, exact) > 1e-3
        assert (
            p_value(
                samples,
                dict(zip(exact, torch.tensor(list(exact.values())).flip(0).tolist(), strict=True)),
            )
            < 1e-9
        )


@pytest.mark.parametrize("mix", [0.3, 0.5, 1.0])
def test_a_mixture_follows_the_token_level_joint(mix):
    policy, reference = small_model(seed=1), small_model(seed=2)

    def mixed(ids):
        return (
            (1 - mix) * next_logits(policy, ids) + mix * next_logits(reference, ids)
        ).log_softmax(-1)

    drawn = HFSampler(models_of(policy, reference), max_new_tokens=3).sample(
        PROMPTS[:2],
        Draw(4000, weights={"policy": 1 - mix, "reference": mix}),
        step=0,
        prompt_ids=[7, 8],
    )
    for prompt, samples in zip(PROMPTS, drawn):
        exact = enumerate_completions(mixed, prompt.tolist(), 3)
        assert p_value(samples, exact) > 1e-3
        alone = enumerate_completions(
            lambda ids: next_logits(policy, ids).log_softmax(-1), prompt.tolist(), 3
        )
        assert p_value(samples, alone) < 1e-9
        for sample in samples[:50]:
            assert (
                abs(
                    float(sample.logps.double().sum())
                    - torch.tensor(exact[tuple(sample.ids.tolist())]).log()
                )
                < 1e-5
            )


@pytest.mark.parametrize(("top", "temperature"), [(1, 1.0), (3, 1.0), (2, 0.7)])
def test_a_teacher_replaces_tokens_that_are_not_among_its_likeliest(top, temperature):
    """The law is S within the teacher's top tokens K, plus (1 - S(K)) T; the recorded log-probs are
    its own.
    """
    policy, teacher = small_model("llama"), small_model("llama", seed=1)

    def law(ids):
        own, theirs = (
            (next_logits(model, ids) / temperature).softmax(-1) for model in (policy, teacher)
        )
        within = torch.zeros_like(own).scatter(-1, theirs.topk(top).indices, 1.0)
        return (own * within + (own * (1 - within)).sum() * theirs).log()

    sampler = HFSampler(
        models_of(policy, teacher=teacher), max_new_tokens=3, temperature=temperature
    )
    for prompt, samples in zip(
        PROMPTS, sampler.sample(PROMPTS[:2], Draw(3000, top=top), step=0, prompt_ids=[7, 8])
    ):
        exact = enumerate_completions(law, prompt.tolist(), 3)
        assert abs(sum(exact.values()) - 1) < 1e-6
        assert p_value(samples, exact) > 1e-3
        for sample in samples[:50]:
            recorded = sample.logps.double().sum()
            assert abs(recorded - torch.tensor(exact[tuple(sample.ids.tolist())]).log()) < 1e-5


def test_a_teacher_whose_every_token_is_likely_changes_nothing():
    policy, teacher = small_model("llama"), small_model("llama", seed=1)
    sampler = HFSampler(models_of(policy, teacher=teacher), max_new_tokens=3)
    arguments = {"step": 0, "prompt_ids": [0]}
    (alone,), (watched,) = (
        sampler.sample(PROMPTS[:1], draw, **arguments) for draw in (Draw(50), Draw(50, top=10**6))
    )
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(alone, watched, strict=True))
    with pytest.raises(ConfigError, match="has a source and no weights"):
        sampler.sample(PROMPTS[:1], Draw(1, top=2, weights={"policy": 1.0}), **arguments)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_temperature_and_nucleus_shape_the_recorded_distribution(temperature, top_p):
    model = small_model(seed=3)

    def shaped(ids):
        probs = (next_logits(model, ids) / temperature).softmax(-1)
        mass, order = 0.0, probs.argsort(descending=True).tolist()
        for rank, token in enumerate(order):
            if mass >= top_p:
                probs[order[rank:]] = 0
                break
            mass += float(probs[token])
        return (probs / probs.sum()).log()

    sampler = HFSampler(models_of(model), max_new_tokens=3, temperature=temperature, top_p=top_p)
    samples = sampler.sample(PROMPTS[:1], Draw(3000), step=0, prompt_ids=[0])[0]
    exact = enumerate_completions(shaped, PROMPTS[0].tolist(), 3)
    assert p_value(samples, exact) > 1e-3
    for sample in samples[:50]:
        assert (
            abs(
                float(sample.logps.double().sum())
                - torch.tensor(exact[tuple(sample.ids.tolist())]).log()
            )
            < 1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_log_probs_are_the_teacher_forced_ones(family):
    """Prompts of different lengths share a batch, so a leak of the left padding into positions or
    attention shows here.
    """
    model = small_model(family, vocab=30, seed=4)
    drawn = HFSampler(models_of(model), max_new_tokens=12).sample(
        PROMPTS, Draw(3), step=0, prompt_ids=range(4)
    )
    for prompt, samples in zip(PROMPTS, drawn, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(torch.cat([prompt, sample.ids])[None], use_cache=False).logits[
                    0, len(prompt) - 1 : -1
                ]
            expected = logits.float().log_softmax(-1).gather(-1, sample.ids[:, None])[:, 0]
            torch.testing.assert_close(sample.logps, expected, rtol=0, atol=1e-5)


def test_samples_do_not_depend_on_batching_order_or_company():
    model = small_model(vocab=30, seed=5)
    sampler = HFSampler(models_of(model), max_new_tokens=10, seed=3)
    together = sampler.sample(PROMPTS, Draw(4), step=2, prompt_ids=[10, 11, 12, 13])
    order = [2, 0, 3, 1]
    shuffled = sampler.sample(
        [PROMPTS[i] for i in order], Draw(4), step=2, prompt_ids=[10 + i for i in order]
    )
    small = HFSampler(models_of(model), max_new_tokens=10, seed=3, token_budget=40).sample(
        PROMPTS, Draw(4), step=2, prompt_ids=[10, 11, 12, 13]
    )
    halves = [
        row
        for r in (0, 2)
        for row in sampler.sample(PROMPTS[r : r + 2], Draw(4), step=2, prompt_ids=[10 + r, 11 + r])
    ]
    fewer = sampler.sample(PROMPTS, Draw(2), step=2, prompt_ids=[10, 11, 12, 13])
    for i in range(4):
        for k in range(4):
            ids = together[i][k].ids
            assert torch.equal(ids, shuffled[order.index(i)][k].ids)
            assert torch.equal(ids, small[i][k].ids)
            assert torch.equal(ids, halves[i][k].ids)
            assert k >= 2 or torch.equal(ids, fewer[i][k].ids)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"step": 3}, {"prompt": 11}])
def test_every_coordinate_changes_the_samples(changed):
    model, base = small_model(vocab=30, seed=5), {"seed": 3, "step": 2, "prompt": 10}

    def draw(seed, step, prompt):
        return HFSampler(models_of(model), max_new_tokens=10, seed=seed).sample(
            PROMPTS[:1], Draw(2), step=step, prompt_ids=[prompt]
        )[0]

    first, second = draw(**base), draw(**{**base, **changed})
    assert not torch.equal(first[0].ids, second[0].ids)
    assert not torch.equal(first[0].ids, first[1].ids)


def test_end_tokens_and_the_cap():
    model = small_model(vocab=5, seed=6)
    rows = HFSampler(models_of(model), max_new_tokens=6).sample(
        PROMPTS, Draw(200), step=0, prompt_ids=range(4)
    )
    flat = [sample for row in rows for sample in row]
    assert {sample.ended for sample in flat} == {True, False}
    for sample in flat:
        assert len(sample.ids) == len(sample.logps) <= 6
        assert sample.ids.dtype == torch.int64
        assert sample.logps.dtype == torch.float32
        assert (sample.ids[:-1] != EOS).all()
        assert sample.ended == (int(sample.ids[-1]) == EOS)
        assert sample.ended or len(sample.ids) == 6


def test_all_end_tokens_of_the_generation_config_stop():
    model = small_model(vocab=5, seed=6)
    model.generation_config.eos_token_id = [EOS, 3]
    rows = HFSampler(models_of(model), max_new_tokens=6).sample(
        PROMPTS[:1], Draw(100), step=0, prompt_ids=[0]
    )
    assert all(sample.ended == (int(sample.ids[-1]) in (EOS, 3)) for sample in rows[0])
    assert any(int(sample.ids[-1]) == 3 for sample in rows[0])


def test_temperature_zero_is_greedy():
    model = small_model(vocab=30, seed=7)
    greedy = HFSampler(models_of(model), max_new_tokens=5, temperature=0).sample(
        PROMPTS[:2], Draw(2), step=0, prompt_ids=[0, 1]
    )
    for prompt, (first, second) in zip(PROMPTS, greedy):
        assert torch.equal(first.ids, second.ids)
        ids = prompt.tolist()
        for token in first.ids.tolist():
            assert token == int(next_logits(model, ids).argmax())
            ids.append(token)


def test_a_group_prefills_its_prompt_once():
    model, seen = small_model(vocab=30, seed=8), []
    sampling_model(models_of(model), "policy", 1.0)  # the trial before the first sample
    handle = model.register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    HFSampler(models_of(model), max_new_tokens=4).sample(
        PROMPTS[:2], Draw(8), step=0, prompt_ids=[0, 1]
    )
    handle.remove()
    assert seen[0] == (2, 7)
    assert all(width == 1 for _, width in seen[1:])
    assert seen[1][0] <= 16


def test_finished_rows_leave_the_batch():
    model, rows = small_model(vocab=4, seed=9), []
    sampling_model(models_of(model), "policy", 1.0)
    handle = model.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True
    )
    HFSampler(models_of(model), max_new_tokens=30).sample(
        PROMPTS[:1], Draw(64), step=0, prompt_ids=[0]
    )
    handle.remove()
    assert rows[-1] < rows[1] / 2
    assert sorted(rows[1:], reverse=True) == rows[1:]


BAD = [
    ({"max_new_tokens": 0}, {}, ConfigError, "max_new_tokens 0"),
    ({"temperature": -1.0}, {}, ConfigError, "temperature -1.0"),
    ({"temperature": float("nan")}, {}, ConfigError, "temperature nan"),
    ({"top_p": 0.0}, {}, ConfigError, "top_p 0.0"),
    ({}, {"draw": Draw(1, weights={"policy": float("nan")})}, ConfigError, "policy is nan"),
    ({}, {"draw": Draw(1, weights={"policy": 0.0})}, ConfigError, "policy is 0"),
    ({}, {"draw": Draw(0)}, ConfigError, "0 completions"),
    ({}, {"prompt_ids": [0, 1]}, ConfigError, "2 prompt ids"),
    ({}, {"prompts": [torch.tensor([], dtype=torch.int64)]}, DataError, "no tokens"),
    ({}, {"prompts": [torch.ones(63, dtype=torch.int64)]}, ConfigError, "context of 64"),
    (
        {},
        {"draw": Draw(1, weights={"policy": 0.5, "reference": 0.5})},
        ModelError,
        "policy 5, reference 4",
    ),
]


@pytest.mark.parametrize(("settings", "call", "error", "text"), BAD)
def test_bad_arguments_are_named(settings, call, error, text):
    models = models_of(small_model(vocab=5), small_model(vocab=4))
    arguments = {"prompts": PROMPTS[:1], "draw": Draw(1), "step": 0, "prompt_ids": [0], **call}
    with pytest.raises(error, match=text):
        HFSampler(models, **{"max_new_tokens": 3, **settings}).sample(
            arguments["prompts"],
            arguments["draw"],
            step=arguments["step"],
            prompt_ids=arguments["prompt_ids"],
        )


def test_broken_weights_are_a_numerical_stop():
    model = small_model(vocab=5)
    with torch.no_grad():
        model.lm_head.weight[1] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        HFSampler(models_of(model), max_new_tokens=3).sample(
            PROMPTS[:1], Draw(1), step=0, prompt_ids=[0]
        )


def test_the_factory_reads_the_section_and_refuses_what_training_cannot_use():
    models = models_of(small_model())
    shaped = RolloutConfig(max_new_tokens=7, temperature=0.5, top_p=0.9)
    sampler = make_sampler(shaped, models, seed=9, exact=False)
    assert (sampler.max_new_tokens, sampler.temperature, sampler.truncated.top_p, sampler.seed) == (
        7,
        0.5,
        0.9,
        9,
    )
    for name, value in (("temperature", 0.5), ("top_p", 0.9)):
        with pytest.raises(ConfigError, match=f"rollout.*{name}:? {value}"):
            make_sampler(RolloutConfig(**{name: value}), models, seed=0)
    assert make_sampler(RolloutConfig(), models, seed=0).temperature == 1


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"max_new_tokens": 0},
        {"completions": 1},
        {"temperature": float("inf")},
    ],
)
def test_the_section_refuses_what_cannot_be_sampled(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        RolloutConfig(**field)
