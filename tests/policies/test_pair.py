"""The pair: log-probs with every kind of reference, rewinding, generation under the right weights,
state, saving.
"""

import pytest
import torch
from tiny_models import bundle, random_bundles, separate_logps, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.batches import Draw, Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig, TargetConfig
from alignkit.errors import CheckpointError, ConfigError, ModelError, ShapeError
from alignkit.policies.folding import merge
from alignkit.policies.load import load_pair
from alignkit.rollout import HFSampler
from alignkit.tensors import gather_logps

PAIRS = Plan("pair")
LORA = AdapterConfig(r=4, alpha=8)
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), initializer_range=0.1)


def make(folder, kind="auto", plan=PAIRS, adapter=None, target=None, fixed_data=True, **settings):
    model = ModelConfig(name_or_path=str(folder), adapter=adapter, **settings)
    return load_pair(
        model, ReferenceConfig(kind=kind, decay=0.75, every=2), target, plan, fixed_data=fixed_data
    )


def step(pair, bundles, plan=PAIRS, optimizer=None, lr=0.05):
    """One optimiser step on the policy's log-probs."""
    optimizer = optimizer or torch.optim.SGD(pair.parameters(), lr=lr)
    optimizer.zero_grad()
    pair.logps(bundles, plan).policy.sum().backward()
    optimizer.step()
    return optimizer


def weights_of(pair):
    return {name: tensor.clone() for name, tensor in pair.base.state_dict().items()}


@pytest.mark.parametrize(
    ("plan", "adapter", "fixed", "kind"),
    [
        (PAIRS, None, True, "cached"),
        (PAIRS, LORA, True, "cached"),
        (PAIRS, None, False, "frozen"),
        (PAIRS, LORA, False, "adapter_off"),
        (
            Plan("pair", statistics={"kl": lambda p, a, y: (p.exp() * (p - a)).sum(-1)}),
            LORA,
            True,
            "adapter_off",
        ),
        (Plan("labelled", mismatched=True), None, True, "frozen"),
        (Plan("sequence", anchors=()), None, True, "none"),
        (
            Plan("game", samples=(Draw(1, weights={"reference": 0.5}),), anchors=()),
            None,
            False,
            "frozen",
        ),
    ],
)
def test_auto_reference(folder, plan, adapter, fixed, kind):
    assert make(folder, plan=plan, adapter=adapter, fixed_data=fixed).reference_kind == kind


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("frozen", None), ("frozen", LORA), ("adapter_off", LORA), ("cached", None), ("cached", LORA)],
)
@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_the_reference_stays_where_training_began(folder, kind, adapter, layout):
    bundles = random_bundles(1)
    pair = make(folder, kind, adapter=adapter, layout=layout)
    start = separate_logps(AutoModelForCausalLM.from_pretrained(folder), bundles)
    if kind == "cached":
        bundles = pair.cached(bundles, PAIRS)
        assert "differ by at most" in pair.notes[-1]
    before = pair.logps(bundles, PAIRS)
    torch.testing.assert_close(before.policy, start, **CLOSE)
    torch.testing.assert_close(before.reference, start, **CLOSE)
    assert before.policy.requires_grad
    assert not before.reference.requires_grad
    step(pair, bundles)
    pair.after_step(1)
    after = pair.logps(bundles, PAIRS)
    torch.testing.assert_close(after.reference, before.reference, **CLOSE)
    assert (after.policy - before.policy).abs().max() > 1e-3
    assert not after.policy[~after.mask].any()
    assert not after.reference[~after.mask].any()


def test_a_moved_policy_is_not_scored_as_the_reference(folder):
    bundles = random_bundles(1)
    pair = make(folder, "cached")
    step(pair, bundles)
    pair.after_step(1)
    with pytest.raises(ModelError, match="score all bundles before training"):
        pair.cached(bundles, PAIRS)


def test_prompts_longer_than_the_budget_are_trained_on(folder):
    bundles = [bundle(list(range(3, 53)), [[7, 8], [9]]), bundle([5], [[6], [7, 8]])]
    pair = make(folder, "frozen")
    parts = pair.micro_batches(bundles, 16)
    assert sorted(map(len, parts)) == [1, 1]
    whole = pair.logps(bundles, PAIRS).sequence()
    for part in parts:
        alone = pair.logps([bundles[i] for i in part], PAIRS).sequence()
        torch.testing.assert_close(
            alone, whole[[2 * i + k for i in part for k in range(2)]], **CLOSE
        )


def test_ema_and_synced_anchors_follow(folder):
    bundles, plan = random_bundles(1), Plan("pair", anchors=("reference", "target"))
    pair = make(folder, "ema", plan, target=TargetConfig(kind="synced", every=2))
    name = "model.model.layers.0.mlp.up_proj.weight"
    history = [weights_of(pair)[name]]
    for i in (1, 2, 3):
        step(pair, bundles, plan)
        pair.after_step(i)
        history.append(weights_of(pair)[name])
    average = history[0]
    for new in history[1:]:
        average = 0.75 * average + 0.25 * new
    torch.testing.assert_close(
        pair.anchors["reference"].module.state_dict()[name], average, rtol=0, atol=1e-6
    )
    assert torch.equal(pair.anchors["target"].module.state_dict()[name], history[2])
    tokens = pair.logps(bundles, plan)
    assert set(tokens.anchors) == {"reference", "target"}
    with pair.model("target") as model:
        torch.testing.assert_close(
            tokens.anchors["target"], separate_logps(model, bundles), **CLOSE
        )


def test_a_lagged_anchor_is_one_copy_behind(folder):
    bundles, plan = random_bundles(1), Plan("pair", anchors=("target", "previous"))
    pair = make(folder, "frozen", plan, target=TargetConfig(kind="synced", every=2))
    name = "model.model.layers.0.mlp.up_proj.weight"
    history = [weights_of(pair)[name]]
    for i in range(1, 6):
        step(pair, bundles, plan)
        pair.after_step(i)
        history.append(weights_of(pair)[name])
        copies = [
            pair.anchors[anchor].module.state_dict()[name] for anchor in ("target", "previous")
        ]
        assert torch.equal(copies[0], history[i - i % 2])
        assert torch.equal(copies[1], history[max(0, i - i % 2 - 2)])
    state = pair.state()
    again = make(folder, "frozen", plan, target=TargetConfig(kind="synced", every=2))
    again.load_state(state)
    assert torch.equal(
        again.logps(bundles, plan).anchors["previous"],
        pair.logps(bundles, plan).anchors["previous"],
    )
    with pytest.raises(ConfigError, match=r"target\.kind: .* got ema"):
        make(folder, "frozen", plan, target=TargetConfig(kind="ema"))


def exact_kl(policy, anchor, labels):
    return (policy.exp() * (policy - anchor)).sum(-1)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("frozen", None),
        ("adapter_off", LORA),
        ("adapter_off", AdapterConfig(r=4, target_modules=["q_proj", "lm_head"])),
    ],
)
def test_statistics_see_the_whole_vocabulary_of_both(folder, kind, adapter):
    plan = Plan("pair", statistics={"kl": exact_kl})
    bundles = random_bundles(2)
    pair = make(folder, kind, plan, adapter=adapter)
    step(pair, bundles, plan)
    tokens = pair.logps(bundles, plan)
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pair.model("policy") as policy, torch.no_grad():
        longest = tokens.mask.shape[1]
        rows = []
        for b in bundles:
            for ids, mask in zip(b.completions, b.masks):
                text = torch.cat([b.prompt, ids])[None]
                p, r = (
                    m(text).logits[0, len(b.prompt) - 1 : -1].log_softmax(-1)
                    for m in (policy, base.eval())
                )
                if kind == "adapter_off":
                    with pair.base.adapter_disabled():
                        torch.testing.assert_close(policy(text).logits, base(text).logits)
                rows.append(
                    torch.nn.functional.pad(
                        torch.where(mask, exact_kl(p, r, ids), 0.0), (0, longest - len(ids))
                    )
                )
    torch.testing.assert_close(tokens.extras["kl"], torch.stack(rows), **CLOSE)
    torch.testing.assert_close(tokens.reference, separate_logps(base, bundles), **CLOSE)
    assert tokens.extras["kl"].sum() > 1e-3
    alone = pair.logps(bundles, plan, anchors=False)
    assert "kl" not in alone.extras
    assert alone.anchors == {}
    torch.testing.assert_close(alone.policy, tokens.policy, **CLOSE)


@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_rewound_is_bit_exact(folder, adapter, steps_before):
    """With Adam, also before its state exists; the random state goes on."""
    bundles = random_bundles(3)
    pair = make(folder, "frozen", adapter=adapter)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=0.01)
    for _ in range(steps_before):
        step(pair, bundles, optimizer=optimizer)
    weights = weights_of(pair)
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    random_state = torch.random.get_rng_state()
    with pair.rewound(optimizer):
        step(pair, bundles, optimizer=optimizer)
        torch.rand(1)
        optimizer.param_groups[0]["lr"] = 5.0
        assert any(not torch.equal(weights[k], v) for k, v in weights_of(pair).items())
    assert all(torch.equal(weights[k], v) for k, v in weights_of(pair).items())
    assert set(optimizer.state) == set(state)
    assert all(
        torch.equal(optimizer.state[p][k], v) for p, s in state.items() for k, v in s.items()
    )
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert not torch.equal(random_state, torch.random.get_rng_state())


def test_generation_uses_the_weights_it_names(folder):
    """With LoRA the reference is the base model: no trace of the adapter, and the adapter is back
    afterwards.
    """
    bundles = random_bundles(4)
    pair = make(folder, "adapter_off", adapter=LORA)
    step(pair, bundles, lr=1.0)
    text = torch.tensor([[5, 6, 7]])
    with pair.model("policy") as policy, torch.no_grad():
        trained = policy(text).logits
    with pair.model("reference") as reference, torch.no_grad():
        assert not reference.training
        torch.testing.assert_close(
            reference(text).logits,
            AutoModelForCausalLM.from_pretrained(folder)(text).logits,
            rtol=0,
            atol=1e-6,
        )
        assert reference.generate(text, max_new_tokens=3, do_sample=False).shape == (1, 6)
    with pair.model("policy") as policy, torch.no_grad():
        assert torch.equal(policy(text).logits, trained)
    assert (trained - AutoModelForCausalLM.from_pretrained(folder)(text).logits).abs().max() > 1e-2
    with pytest.raises(ModelError, match="no anchor 'target'"), pair.model("target"):
        pass


def test_the_reference_half_of_a_mixture_is_the_base_model(folder):
    pair, prompt = make(folder, "adapter_off", adapter=LORA), torch.tensor([5, 6, 7])
    step(pair, random_bundles(4), lr=1.0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    (samples,) = HFSampler(pair, max_new_tokens=4).sample(
        [prompt], Draw(8, weights={"policy": 0.5, "reference": 0.5}), step=0, prompt_ids=[0]
    )
    with pair.model("policy") as policy, torch.no_grad():
        for sample in samples:
            own, disk = (
                model(torch.cat([prompt, sample.ids])[None]).logits[0, 2:-1]
                for model in (policy, base)
            )
            torch.testing.assert_close(
                gather_logps(0.5 * own + 0.5 * disk, sample.ids), sample.logps, **CLOSE
            )
            assert (gather_logps(own, sample.ids) - sample.logps).abs().max() > 1e-2


def test_a_pretrained_adapter_keeps_its_start_as_the_reference(folder, tmp_path):
    bundles = random_bundles(5)
    first = make(folder, "adapter_off", adapter=LORA)
    step(first, bundles, lr=1.0)
    first.save(tmp_path)
    start = first.logps(bundles, PAIRS).policy.detach()
    second = make(folder, "adapter_off", adapter=AdapterConfig(path=str(tmp_path)))
    torch.testing.assert_close(second.logps(bundles, PAIRS).policy, start, **CLOSE)
    step(second, bundles, lr=1.0)
    tokens = second.logps(bundles, PAIRS)
    torch.testing.assert_close(tokens.reference, start, **CLOSE)
    assert (tokens.policy - start).abs().max() > 1e-2
    assert all("reference" not in name for name in second.state())
    assert tokens.policy.requires_grad


def test_state_round_trip(folder):
    bundles, plan = random_bundles(6), Plan("pair", anchors=("reference", "target"), values=True)
    pair = make(folder, "frozen", plan, target=TargetConfig(kind="ema"))
    step(pair, bundles, plan)
    pair.after_step(1)
    state, tokens = pair.state(), pair.logps(bundles, plan)
    step(pair, bundles, plan)
    pair.after_step(2)
    assert not torch.equal(pair.logps(bundles, plan).policy, tokens.policy)
    pair.load_state(state)
    again = pair.logps(bundles, plan)
    assert torch.equal(again.policy, tokens.policy)
    assert torch.equal(again.anchors["target"], tokens.anchors["target"])
    with pytest.raises(CheckpointError, match="does not fit"):
        make(folder, adapter=LORA).load_state(state)


def test_save_and_merge(folder, tmp_path):
    bundles = random_bundles(7)
    pair = make(folder, "adapter_off", adapter=LORA)
    step(pair, bundles, lr=1.0)
    pair.save(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    merge(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        separate_logps(merged, bundles), pair.logps(bundles, PAIRS).policy.detach(), **CLOSE
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<pad>"
    with pytest.raises(ModelError, match="holds no adapter"):
        merge(folder, tmp_path / "nothing")


def test_saving_keeps_ties_and_dropout(tmp_path):
    source = write_model(tmp_path / "base", "gpt2", resid_pdrop=0.25, tie_word_embeddings=True)
    pair = make(source, "frozen")
    config = pair.base.model.config
    assert config.resid_pdrop == 0.0
    step(pair, random_bundles(8))
    pair.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.resid_pdrop == 0.25
    assert config.resid_pdrop == 0.0
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    torch.testing.assert_close(
        separate_logps(loaded.eval(), random_bundles(8)),
        pair.logps(random_bundles(8), PAIRS).policy.detach(),
        **CLOSE,
    )


def test_behaviour_log_probs_come_from_the_bundles(folder):
    stored = bundle([5, 6], [[7, 8, 9], [4]], [[True, False, True], [True]])
    stored = type(stored)(
        stored.prompt,
        stored.completions,
        stored.masks,
        tokens={"behavior": [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0])]},
    )
    tokens = make(folder, "frozen").logps([stored], PAIRS)
    assert tokens.behavior.tolist() == [[-1.0, 0.0, -3.0], [-4.0, 0.0, 0.0]]

    # One row for two completions would otherwise count for both.
    stored.tokens["behavior"].pop()
    with pytest.raises(ShapeError, match="shapes differ"):
        make(folder, "frozen").logps([stored], PAIRS)


def test_kinds_that_cannot_work_are_refused(folder):
    with pytest.raises(ConfigError, match="needs a LoRA adapter"):
        make(folder, "adapter_off")
    with pytest.raises(ConfigError, match="sampled during the run"):
        make(folder, "cached", fixed_data=False)
    with pytest.raises(ConfigError, match="whole vocabulary"):
        make(folder, "cached", Plan("pair", statistics={"kl": exact_kl}))
