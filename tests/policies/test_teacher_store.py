"""The teacher's most likely tokens: the same statistic on k + 1 outcomes, and the file that keeps
them.
"""

import resource

import pytest
import torch
from tiny_models import (
    VOCAB,
    random_bundles,
    separate_logps,
    tiny_model,
    with_teacher,
    write_model,
    write_padded,
)

from alignkit.batches import Plan
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.errors import ModelError, ResourceError
from alignkit.losses import distillation_loss
from alignkit.objectives.distillation.pld import PLD
from alignkit.objectives.distillation.teacher_base import teacher_statistic
from alignkit.policies.load import load_pair
from alignkit.policies.teacher_store import release_teacher
from alignkit.policies.teacher_store import with_stored_teacher as stored_by

NAMES = ("forward_kl", "reverse_kl", "jsd")
LAWS = Plan("sequence", {n: teacher_statistic(divergence=n) for n in NAMES}, ("teacher",))


def with_stored_teacher(pair, bundles, top, store=None):
    """By the teacher of the fixture below."""
    folder = pair.teacher_folder
    teacher = TeacherConfig(name_or_path=folder, top=top, store=store and str(store))
    return stored_by(pair, bundles, teacher, ModelConfig())


@pytest.fixture
def pair(tmp_path):
    teacher = write_model(tmp_path / "t", "gpt2", 5)
    loaded = with_teacher(write_model(tmp_path / "s"), teacher, LAWS)
    loaded.teacher_folder = teacher
    return loaded


def coarse(logprobs, ids):
    others = torch.ones_like(logprobs).scatter(-1, ids, 0.0)
    tail = (logprobs.exp() * others).sum(-1, keepdim=True).log()
    return torch.cat([logprobs.gather(-1, ids), tail], -1)


@pytest.mark.parametrize("top", [1, 7])
def test_statistics_see_the_top_and_one_bucket(pair, top):
    bundles = random_bundles(3)
    stored = with_stored_teacher(pair, bundles, top)
    laws = []
    for network in (pair.base.model, tiny_model("gpt2", 5)):
        kept = []
        separate_logps(network, bundles, lambda lp, ids, kept=kept: kept.append(lp) or lp[:, 0])
        laws.append(torch.cat(kept).detach())
    policy, teacher = laws
    ids = teacher.topk(top).indices
    every = torch.cat([m for bundle in bundles for m in bundle.masks])

    live = pair.logps(bundles, LAWS)
    pair.anchors["teacher"].module = None  # nothing asks the teacher again
    found = pair.logps(stored, LAWS)
    for name in NAMES:
        expected = distillation_loss(coarse(policy, ids), coarse(teacher, ids), divergence=name)
        own = found.extras[name][found.mask]
        torch.testing.assert_close(own, expected[every], rtol=0, atol=2e-5)
        assert bool((own <= live.extras[name][live.mask] + 1e-5).all())
    torch.testing.assert_close(found.anchors["teacher"], live.anchors["teacher"], rtol=0, atol=1e-5)


def test_all_tokens_but_one_are_the_whole_law(pair):
    bundles = random_bundles(3)
    live = pair.logps(bundles, LAWS)
    found = pair.logps(with_stored_teacher(pair, bundles, VOCAB - 1), LAWS)
    for name in NAMES:
        torch.testing.assert_close(found.extras[name], live.extras[name], rtol=0, atol=2e-5)
    ranked = [
        pair.logps(b, PLD().plan).extras["pld"]
        for b in (bundles, with_stored_teacher(pair, bundles, VOCAB - 1))
    ]
    torch.testing.assert_close(*ranked, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stored_on_disk", [False, True])
def test_a_policy_with_more_padding_than_the_teacher(tmp_path, stored_on_disk):
    """Both laws are of the tokens that both have, as with a live teacher: in the last bucket too."""
    write_padded(tmp_path / "s", 1, 72)
    teacher = write_padded(tmp_path / "t", 2, VOCAB)
    model = ModelConfig(name_or_path=str(tmp_path / "s"))
    pair = load_pair(model, ReferenceConfig(), None, LAWS, fixed_data=True)
    store = tmp_path / "store" if stored_on_disk else None
    section = TeacherConfig(name_or_path=str(tmp_path / "t"), top=5, store=store and str(store))
    bundles = random_bundles(3, vocab=VOCAB)
    rows = stored_by(pair, bundles, section, model)
    for _ in range(2):  # made, and read
        release_teacher(pair)
        with torch.no_grad():  # from here on the padding is likely
            pair.base.model.lm_head.weight[VOCAB:, 0] = 0.0
        found = pair.logps(rows, LAWS)

        laws = []
        for network in (pair.base.model, teacher):
            kept = []
            separate_logps(network, bundles, lambda lp, ids, kept=kept: kept.append(lp) or lp[:, 0])
            laws.append(torch.cat(kept).detach()[:, :VOCAB].log_softmax(-1))
        policy, wanted = laws
        ids = wanted.topk(5).indices
        every = torch.cat([m for bundle in bundles for m in bundle.masks])
        for name in NAMES:
            expected = distillation_loss(coarse(policy, ids), coarse(wanted, ids), divergence=name)
            own = found.extras[name][found.mask]
            torch.testing.assert_close(own, expected[every], rtol=0, atol=2e-5)
        if stored_on_disk:
            pair.anchors["teacher"].vocabulary = None
            rows = stored_by(pair, bundles, section, model)


def test_the_gradient_goes_through_both_parts(pair):
    bundles = random_bundles(3)
    grads = []
    for rows in (bundles, with_stored_teacher(pair, bundles, VOCAB - 1)):
        pair.base.zero_grad()
        pair.logps(rows, LAWS).extras["jsd"].sum().backward()
        grads.append([p.grad.clone() for p in pair.parameters()])
    for whole, stored in zip(*grads):
        torch.testing.assert_close(stored, whole, rtol=0, atol=2e-4)


def test_a_store_is_read_by_the_next_run(pair, tmp_path, monkeypatch):
    first, more = random_bundles(3, 3), random_bundles(4, 2)
    with_stored_teacher(pair, first, 4, tmp_path / "store")
    both = with_stored_teacher(pair, [*first, *more], 4, tmp_path / "store")
    assert "3 rows read" in pair.notes[-1]
    monkeypatch.setattr("alignkit.policies.teacher_store._top", lambda *_: pytest.fail("scored"))
    release_teacher(pair)
    again = with_stored_teacher(pair, [*more[::-1], *first], 4, tmp_path / "store")
    for one, other in zip(both, [*again[2:], *again[1::-1]], strict=True):
        for name, values in one.tokens.items():
            assert all(map(torch.equal, values, other.tokens[name]))
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1


def test_what_a_store_refuses(pair, tmp_path):
    bundles = random_bundles(3)
    for top in (VOCAB, VOCAB + 5):
        with pytest.raises(ModelError, match=f"teacher.top: {top} of a vocabulary of {VOCAB}"):
            with_stored_teacher(pair, bundles, top)
    store = tmp_path / "store"
    with_stored_teacher(pair, bundles, 4, store)
    (file,) = store.glob("*.safetensors")
    content = file.read_bytes()
    position = len(content) // 2
    for damaged in (b"", content[:-9], content[:position] + b"\xff" * 8 + content[position + 8 :]):
        file.write_bytes(damaged)
        with pytest.raises(
            ResourceError, match=r"teacher.store: .* is damaged; delete it"
        ) as error:
            with_stored_teacher(pair, bundles, 4, store)
        assert error.value.exit_code == 7


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(pair, tmp_path):
    store, bundles = tmp_path / "store", random_bundles(3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"cannot write .*store.*free space") as error:
            with_stored_teacher(pair, bundles, 4, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.exit_code == 7
    assert [file.suffix for file in store.iterdir()] == [".lock"]
    with_stored_teacher(pair, bundles, 4, store)
    assert len(list(store.glob("*.safetensors"))) == 1
