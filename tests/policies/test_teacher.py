"""The teacher beside the policy: its log-probs and whole laws, vocabularies of unequal padding, and
what is refused.
"""

from functools import partial

import pytest
import tiny_models
import torch
from tiny_models import (
    VOCAB,
    random_bundles,
    separate_logps,
    tiny_model,
    write_model,
    write_padded,
)
from transformers import AutoModelForCausalLM

from alignkit.batches import Bundle, Draw, Plan
from alignkit.errors import ModelError
from alignkit.losses import distillation_loss
from alignkit.objectives.distillation.teacher_base import teacher_statistic
from alignkit.rollout.hf import HFSampler

TOKENS = VOCAB
LAWS = Plan("sequence", {"divergence": teacher_statistic(divergence="jsd")}, ("teacher",))


with_teacher = partial(tiny_models.with_teacher, plan=LAWS)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_another_architecture_of_the_same_tokenizer(tmp_path, architecture):
    student, teacher = write_model(tmp_path / "s"), write_model(tmp_path / "t", architecture, 5)
    pair, bundles = with_teacher(student, teacher), random_bundles(1)
    network = tiny_model(architecture, 5)
    tokens = pair.logps(bundles, LAWS)
    torch.testing.assert_close(
        tokens.anchors["teacher"], separate_logps(network, bundles), rtol=0, atol=2e-5
    )
    assert set(pair.anchors) == {"teacher"}, "a statistic of the teacher needs no reference"
    plain = pair.logps(bundles, Plan("sequence", anchors=("teacher",)))
    torch.testing.assert_close(
        plain.anchors["teacher"], tokens.anchors["teacher"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("own", "theirs"), [(TOKENS, 72), (72, TOKENS), (64, 72)])
def test_vocabularies_of_unequal_padding_are_cut_before_the_softmax(tmp_path, own, theirs):
    student = write_padded(tmp_path / "s", 1, own)
    teacher = write_padded(tmp_path / "t", 2, theirs)
    shared = min(own, theirs)
    pair, bundles = with_teacher(tmp_path / "s", tmp_path / "t"), random_bundles(1, vocab=TOKENS)
    assert f"compared on the first {shared} tokens" in "".join(pair.notes)

    laws = []
    for network in (student, teacher):
        whole = []
        separate_logps(network, bundles, lambda l, ids, kept=whole: kept.append(l) or l[:, 0])  # noqa: E741
        laws.append([logprobs[:, :shared].log_softmax(-1) for logprobs in whole])
    expected = torch.cat(
        [distillation_loss(s, t, divergence="jsd").detach() for s, t in zip(*laws)]
    )
    every = torch.cat([m for bundle in bundles for m in bundle.masks])
    found = pair.logps(bundles, LAWS)
    torch.testing.assert_close(
        found.extras["divergence"][found.mask], expected[every], rtol=0, atol=2e-5
    )


def test_a_token_that_only_the_policy_has_is_an_error(tmp_path):
    write_padded(tmp_path / "s", 1, 72)
    write_padded(tmp_path / "t", 2, TOKENS)
    pair, bundles = with_teacher(tmp_path / "s", tmp_path / "t"), random_bundles(1)
    bundles[0].completions[0][-1] = 70
    bundles[0].masks[0][-1] = True
    for plan in (LAWS, Plan("sequence", anchors=("teacher",))):
        with pytest.raises(ModelError, match=r"has the token 70, which the teacher does not have"):
            pair.logps(bundles, plan)


def law(network, ids, shared):
    """The next token's law over the tokens that both models have."""
    with torch.no_grad():
        return network(ids[None]).logits[0, -1, :shared].softmax(-1)


@pytest.mark.parametrize(("own", "theirs"), [(TOKENS, 72), (72, TOKENS)])
@pytest.mark.parametrize(
    "draw", [Draw(4000, top=5), Draw(4000, source="teacher")], ids=["proposes", "alone"]
)
def test_a_padded_teacher_draws_what_the_policy_can_read(tmp_path, own, theirs, draw):
    """Proposing and sampling alone: the law over the shared tokens, also where padding is likely."""
    student = write_padded(tmp_path / "s", 1, own)
    teacher = write_padded(tmp_path / "t", 2, theirs)
    plan = Plan("rollout", anchors=(), samples=(draw,))
    pair = with_teacher(tmp_path / "s", tmp_path / "t", plan=plan)
    with torch.no_grad():  # from here on the padding of each is likely
        for module in (pair.base, pair.anchors["teacher"].module):
            module.model.lm_head.weight[TOKENS:, 0] = 0.0

    prompt = torch.tensor([3, 4])
    proposed, judged = law(student, prompt, TOKENS), law(teacher, prompt, TOKENS)
    within = torch.zeros_like(judged).scatter(-1, judged.topk(5).indices, 1.0)
    mixed = proposed * within + (1 - (proposed * within).sum()) * judged
    expected = judged if draw.top is None else mixed

    sampler = HFSampler(pair, max_new_tokens=1, seed=1)
    (samples,) = sampler.sample([prompt], draw, step=0, prompt_ids=[0])
    tokens = torch.tensor([int(s.ids[0]) for s in samples])
    assert int(tokens.max()) < TOKENS
    counts = torch.bincount(tokens, minlength=TOKENS)[:TOKENS] / len(tokens)
    assert float((counts - expected).abs().sum()) < 0.1
    logps = torch.stack([s.logps[0] for s in samples])
    torch.testing.assert_close(logps, expected.log()[tokens].float(), rtol=0, atol=1e-4)

    scored = Bundle(prompt, [s.ids for s in samples[:8]], [torch.ones(1, dtype=torch.bool)] * 8)
    assert pair.logps([scored], LAWS).extras["divergence"].isfinite().all()


def test_tied_embeddings_of_unequal_padding(tmp_path):
    """A teacher and a student whose heads are their embeddings."""
    networks = []
    for name, seed, vocab in (("s", 1, 64), ("t", 2, 72)):
        write_model(tmp_path / name, seed=seed, vocab=vocab, tokens=TOKENS)
        network = tiny_model("llama", seed, vocab)
        network.config.tie_word_embeddings = True
        network.tie_weights()
        with torch.no_grad():  # the first channel is large everywhere and lowers the padding
            network.model.embed_tokens.weight[:, 0] = 30.0
            network.model.embed_tokens.weight[TOKENS:] = 0.0
            network.model.embed_tokens.weight[TOKENS:, 0] = -30.0
        network.save_pretrained(tmp_path / name)
        networks.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval())

    pair, bundles = with_teacher(tmp_path / "s", tmp_path / "t"), random_bundles(1, vocab=TOKENS)
    assert pair.base.model.lm_head.weight is pair.base.model.model.embed_tokens.weight
    expected = []
    for network in networks:
        whole = []
        separate_logps(network, bundles, lambda lp, ids, kept=whole: kept.append(lp) or lp[:, 0])
        expected.append(torch.cat([lp[:, :64].log_softmax(-1) for lp in whole]).detach())
    every = torch.cat([m for bundle in bundles for m in bundle.masks])
    found = pair.logps(bundles, LAWS)
    divergence = distillation_loss(*expected, divergence="jsd")
    torch.testing.assert_close(
        found.extras["divergence"][found.mask], divergence[every], rtol=0, atol=2e-5
    )
    found.extras["divergence"].sum().backward()
    gradient = pair.base.model.model.embed_tokens.weight.grad
    assert gradient[:TOKENS].abs().max() > 1e-4  # once, for both uses


def test_teachers_that_do_not_fit(tmp_path):
    student = write_model(tmp_path / "s")
    foreign = write_model(tmp_path / "foreign", vocab=50)
    wider = write_model(tmp_path / "wider", vocab=72, tokens=TOKENS)
    (tmp_path / "empty").mkdir()
    for teacher, message in (
        (foreign, r"teacher.name_or_path: the tokenizer of .* \(50 tokens\) is not the policy's"),
        (wider, "the larger model gives up to .* of its probability to tokens that the other"),
        (tmp_path / "empty", "teacher.name_or_path: the folder .* holds no config.json"),
        ("nobody/no-such-model", "teacher.name_or_path: nobody/no-such-model could not be loaded"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            with_teacher(student, teacher)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)


def test_a_teacher_that_cannot_branch_gets_padded_rows(tmp_path):
    pair = with_teacher(write_model(tmp_path / "s"), write_model(tmp_path / "t", "bloom", 3))
    assert pair.layout == "padded"
    bundles = random_bundles(2)
    expected = separate_logps(tiny_model("bloom", 3), bundles)
    found = pair.logps(bundles, LAWS).anchors["teacher"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_an_adapter_is_a_teacher(tmp_path):
    from peft import LoraConfig, get_peft_model

    student = write_model(tmp_path / "s")
    base = AutoModelForCausalLM.from_pretrained(student)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    pair, bundles = with_teacher(student, tmp_path / "adapter"), random_bundles(1)
    expected = separate_logps(adapted, bundles).detach()
    for plan in (LAWS, Plan("sequence", anchors=("teacher",))):
        found = pair.logps(bundles, plan)
        torch.testing.assert_close(found.anchors["teacher"], expected, rtol=0, atol=2e-5)
    assert (found.policy - found.anchors["teacher"]).abs().max() > 1e-3


def test_the_teacher_can_sample(tmp_path):
    plan = Plan("rollout", anchors=(), samples=(Draw(2, source="teacher"),))
    pair = with_teacher(write_model(tmp_path / "s"), write_model(tmp_path / "t", seed=4), plan=plan)
    sampler = HFSampler(pair, max_new_tokens=4, seed=1)
    ((first, _),) = sampler.sample([torch.tensor([3, 4])], plan.samples[0], step=0, prompt_ids=[0])
    logits = tiny_model("llama", 4)(torch.cat([torch.tensor([3, 4]), first.ids])[None]).logits
    logps = logits[0, 1:-1].log_softmax(-1).gather(-1, first.ids[:, None])[:, 0]
    torch.testing.assert_close(first.logps, logps.detach(), rtol=0, atol=1e-4)


def test_gradients_of_the_policy_alone(tmp_path):
    pair = with_teacher(write_model(tmp_path / "s"), write_model(tmp_path / "t", seed=4))
    pair.logps(random_bundles(1), LAWS).extras["divergence"].sum().backward()
    assert all(p.grad is None for p in pair.anchors["teacher"].module.parameters())
    assert all(p.grad is not None for p in pair.parameters())
