"""Distillation: closed optima on the tabular policy, which tokens have a likelihood, the policy's
own answers in the place of given ones, TRL's numbers.
"""

import pytest
import torch
from accelerate import Accelerator
from world import pairs, save_model

from alignkit import Distill
from alignkit.batches import Bundle, SequenceBatch, TokenLogps
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.errors import ShapeError
from alignkit.oracles.optima import minimise
from alignkit.policies.load import load_pair
from alignkit.policies.tabular import Tree
from alignkit.policies.teacher import add_teacher
from alignkit.rollout.hf import HFSampler
from alignkit.sources.dataset import DatasetSource
from alignkit.sources.sampled_pairs import SampledPairs
from alignkit.testing import check_objective


@pytest.mark.parametrize("objective", Distill.examples(), ids=lambda o: f"{o.divergence}-{o.share}")
def test_every_setting_holds(objective):
    assert check_objective(objective)


@pytest.mark.parametrize("kd_ratio", [0.3, 0.8])
def test_likelihood_and_forward_kl_end_at_the_arithmetic_mixture(kd_ratio):
    """(1 - kd_ratio) q + kd_ratio T at every prefix, with q the data's law."""
    tree = Tree.build(3, 2, eos=False)
    noise = torch.Generator().manual_seed(0)
    data, teacher = (
        torch.randn(tree.states, 3, generator=noise, dtype=torch.float64).log_softmax(-1)
        for _ in range(2)
    )
    objective = Distill(kd_ratio=kd_ratio)
    weights = tree.sequence_logps(data).exp()[:, None]

    def loss(theta):
        tokens = tree.token_logps(theta, {"teacher": teacher}, objective.plan)
        terms = objective.loss(SequenceBatch(tokens)).terms
        return sum(term.weight * (weights * term.values).sum() for term in terms)

    found = minimise(loss, torch.zeros_like(teacher)).softmax(-1)
    wanted = (1 - kd_ratio) * data.exp() + kd_ratio * teacher.exp()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_only_given_answers_have_a_likelihood():
    mask = torch.tensor([[True, True], [True, False]])
    policy = -torch.ones(2, 2)
    tokens = TokenLogps(policy, {}, mask, extras={"divergence": torch.ones(2, 2) * mask})
    objective = Distill(kd_ratio=0.25, share=0.5)
    kd, nll = objective.loss(SequenceBatch(tokens, torch.tensor([0, -1]))).terms
    assert kd.weight == 0.25
    assert nll.weight == 0.75
    assert kd.values.tolist() == [[1, 1], [1, 0]]
    assert nll.values.tolist() == [[0, 0], [1, 0]]
    (_, every) = objective.loss(SequenceBatch(tokens)).terms
    assert every.values.tolist() == [[1, 1], [1, 0]]


def test_settings_that_cannot_be(tmp_path):
    for fields, message in (
        ({"divergence": "jsd", "beta": 0.0}, "ask for forward_kl or reverse_kl by name"),
        ({"divergence": "jsd", "beta": 1.0}, "ask for forward_kl or reverse_kl by name"),
        ({"temperature": 0.0}, "give a positive, finite number"),
        ({"share": 1.0, "kd_ratio": 0.5}, "with share 1 there are none"),
    ):
        with pytest.raises(ValueError, match=message):
            Distill(**fields)
    with pytest.raises(ShapeError, match=r"teacher's log-probs .* were not given"):
        Distill().plan.statistics["divergence"](torch.zeros(1, 3), None, torch.zeros(1).long())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "student"), save_model(folder / "teacher", seed=1)


def test_own_answers_take_the_place_of_so_many_given_ones(models):
    objective = Distill(share=0.3)
    model = ModelConfig(name_or_path=str(models[0]))
    pair = load_pair(model, ReferenceConfig(), None, objective.plan, fixed_data=False)
    add_teacher(pair, TeacherConfig(name_or_path=str(models[1])), model)
    bundles = pairs(400, k=1)

    def source(rank=0, world=1):
        rows = DatasetSource(bundles, objective.plan, 400, seed=0, rank=rank, world=world)
        sampler = HFSampler(pair, max_new_tokens=3, seed=0)
        return SampledPairs(rows, sampler, objective.plan, 8, Accelerator(cpu=True))

    whole = source()
    given = DatasetSource(bundles, objective.plan, 400, seed=0)
    collected = whole.collect(0)
    own = [int(bundle.rows["draw"][0]) == 0 for bundle in collected]
    assert 0.23 < sum(own) / len(own) < 0.37
    assert whole.metrics["rollout/own_share"] == sum(own) / len(own)
    for bundle, before, is_own in zip(collected, given.collect(0), own, strict=True):
        assert torch.equal(bundle.prompt, before.prompt)
        assert len(bundle.completions) == 1
        assert is_own or torch.equal(bundle.completions[0], before.completions[0])
        assert not is_own or (len(bundle.completions[0]) <= 3 and bundle.masks[0].all())

    # The same rows and samples for any number of processes; other rows in the next step.
    for rank in range(2):
        half = source(rank, 2).collect(0)
        for mine, same in zip(half, collected[rank::2], strict=True):
            assert mine.rows["draw"] == same.rows["draw"]
            assert torch.equal(mine.completions[0], same.completions[0])
    again = [int(bundle.rows["draw"][0]) == 0 for bundle in whole.collect(1)]
    assert again != own


def test_a_one_token_answer_and_the_end_token_are_taught(models):
    objective = Distill()
    model = ModelConfig(name_or_path=str(models[0]))
    pair = load_pair(model, ReferenceConfig(), None, objective.plan, fixed_data=True)
    add_teacher(pair, TeacherConfig(name_or_path=str(models[1])), model)
    eos = torch.tensor([2])
    bundle = Bundle(torch.tensor([3, 4]), [eos], [torch.ones(1, dtype=torch.bool)])
    tokens = pair.logps([bundle], objective.plan)
    (term,) = objective.loss(SequenceBatch(tokens)).terms
    student, teacher = (
        m.model(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1)
        for m in (pair.base, pair.anchors["teacher"].module)
    )
    wanted = (teacher.exp() * (teacher - student)).sum()
    torch.testing.assert_close(term.values.sum(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("beta", "settings"),
    [
        (0.0, {"divergence": "forward_kl"}),
        (1.0, {"divergence": "reverse_kl"}),
        (0.3, {"divergence": "jsd", "beta": 0.3}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_trl_has_the_same_numbers(beta, settings, temperature):
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    if not hasattr(trainer, "_chunked_divergence_loss"):
        pytest.skip("this release of TRL computes its distillation loss elsewhere")
    noise = torch.Generator().manual_seed(0)
    hidden = [torch.randn(3, 5, 8, generator=noise) for _ in range(2)]
    heads = [torch.randn(23, 8, generator=noise) for _ in range(2)]
    mask = torch.rand(3, 5, generator=noise) < 0.7
    hidden[0].requires_grad_()
    loss, _, _ = trainer._chunked_divergence_loss(
        *hidden, *heads, mask, beta, temperature=temperature
    )
    (wanted_grad,) = torch.autograd.grad(loss, hidden[0])

    objective = Distill(temperature=temperature, **settings)
    policy, teacher = ((h @ w.T).log_softmax(-1) for h, w in zip(hidden, heads))
    values = objective.plan.statistics["divergence"](policy, teacher, torch.zeros(3, 5).long())
    tokens = TokenLogps(policy[..., 0], {}, mask, extras={"divergence": values * mask})
    (term,) = objective.loss(SequenceBatch(tokens)).terms
    own = term.weight * term.values.sum() / mask.sum()
    (own_grad,) = torch.autograd.grad(own, hidden[0])
    torch.testing.assert_close(own, loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(own_grad, wanted_grad, rtol=0, atol=1e-6)
