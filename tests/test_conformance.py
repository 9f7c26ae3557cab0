"""The conformance suite holds for every built-in objective, and an objective broken on purpose
fails it.
"""

from importlib import import_module

import pytest
import torch
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.errors import ConfigError
from alignkit.losses import (
    dpo_loss,
    fdpo_loss,
    hdpo_loss,
    hinge_loss,
    ipo_loss,
    radpo_loss,
    robust_dpo_loss,
    simpo_loss,
    tdpo_loss,
)
from alignkit.objectives import OBJECTIVES, locate
from alignkit.objectives.preference.dpo import DPO
from alignkit.testing import ConformanceError, check_objective, verify

# margin h = 0.75
PW, PL, RW, RL = (torch.tensor([v], dtype=torch.float64) for v in (-2.0, -3.0, -2.5, -2.75))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_holds(name):
    module, cls, _ = locate(name)
    assert check_objective(getattr(import_module(module), cls).examples()[0])


class WrongSign(DPO):
    def loss(self, batch: PairBatch) -> LossTerms:
        pc, pr, rc, rr = batch.sequence_logps()
        return batch.rows("dpo", dpo_loss(pr, pc, rr, rc, beta=self.beta), scale=self.beta)


class MissingBeta(DPO):
    def loss(self, batch: PairBatch) -> LossTerms:
        return batch.rows("dpo", dpo_loss(*batch.sequence_logps(), beta=1.0), scale=self.beta)


class LeakedAnchor(DPO):
    def loss(self, batch: PairBatch) -> LossTerms:
        pc, pr, rc, rr = batch.sequence_logps()
        return batch.rows("dpo", -logsigmoid(self.beta * (pc - rc - pr + rr)), scale=self.beta)


class MeanOfBatch(DPO):
    def loss(self, batch: PairBatch) -> LossTerms:
        losses = dpo_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("dpo", losses * losses.mean(), scale=self.beta)


@pytest.mark.parametrize(
    "cls", [WrongSign, MissingBeta, LeakedAnchor, MeanOfBatch], ids=lambda c: c.__name__
)
def test_an_objective_broken_on_purpose_fails(cls):
    with pytest.raises(ConformanceError, match="fails the conformance suite"):
        check_objective(cls(beta=0.3))


def test_verify_prints_a_table_and_returns_a_code(capsys):
    assert verify(["ipo"]) == 0
    assert "checks hold, 1 objectives" in capsys.readouterr().out
    assert verify([f"{__file__}:WrongSign"]) == 1
    with pytest.raises(ConfigError, match="did you mean `hdpo`"):
        verify(["hdpoo"])


def test_losses_by_hand():
    """Hand-worked values at one pair: h = (-2 + 2.5) - (-3 + 2.75) = 0.75."""
    pair = (PW, PL, RW, RL)
    lsig = lambda x: float(logsigmoid(torch.tensor(x, dtype=torch.float64)))  # noqa: E731
    expected = {
        -lsig(0.075): dpo_loss(*pair, beta=0.1),
        -0.9 * lsig(0.075) - 0.1 * lsig(-0.075): dpo_loss(*pair, beta=0.1, label_smoothing=0.1),
        (-0.9 * lsig(0.075) + 0.1 * lsig(-0.075)) / 0.8: robust_dpo_loss(
            *pair, beta=0.1, label_smoothing=0.1
        ),
        (0.75 - 5.0) ** 2: ipo_loss(*pair, tau=0.1),
        (0.5 / 2 + 0.25 / 4 - 5.0) ** 2: ipo_loss(
            *pair, tau=0.1, chosen_lengths=torch.tensor([2]), rejected_lengths=torch.tensor([4])
        ),
        1 - 0.075: hinge_loss(*pair, beta=0.1),
        -lsig(0.09 * 1.0 - 0.1 * 0.25): hdpo_loss(*pair, beta=0.1, alpha=0.9),
        -lsig(0.075 - 0.1 * (0.4 - 0.3)): tdpo_loss(*pair, *_kl(0.3, 0.4), beta=0.1),
        -lsig(0.075 - 0.05 * (0.4 - 0.3)): radpo_loss(
            *pair, *_kl(0.3, 0.4), beta=0.1, alpha=0.5, version=2
        ),
    }
    for value, found in expected.items():
        assert float(found) == pytest.approx(value, rel=1e-12)
    u = torch.tensor([0.5, -0.25], dtype=torch.float64).exp()
    forward = -lsig(float(0.1 * (-1 / u[0] + 1 / u[1])))
    shannon = -lsig(float(0.1 * ((2 * u / (1 + u)).log()[0] - (2 * u / (1 + u)).log()[1])))
    assert float(fdpo_loss(*pair, beta=0.1, divergence="forward_kl")) == pytest.approx(
        forward, rel=1e-12
    )
    assert float(fdpo_loss(*pair, beta=0.1, divergence="jensen_shannon")) == pytest.approx(
        shannon, rel=1e-12
    )
    lengths = (torch.tensor([2]), torch.tensor([4]))
    assert float(simpo_loss(PW, PL, *lengths, beta=2.0, gamma=0.5)) == pytest.approx(
        -lsig(2 * (-1 + 0.75) - 0.5), rel=1e-12
    )


def _kl(chosen, rejected):
    return (
        torch.tensor([chosen], dtype=torch.float64),
        torch.tensor([rejected], dtype=torch.float64),
    )


ANCHORED = ("dpo", "fdpo", "hdpo", "tdpo", "radpo", "robust_dpo", "hinge", "kto", "simpo")
OUT_OF_RANGE = [
    (name, "beta", v) for name in ANCHORED for v in (0, -1.0, float("nan"), float("inf"))
]
OUT_OF_RANGE += [
    ("dpo", "label_smoothing", 0.5),
    ("robust_dpo", "label_smoothing", 0.5),
    ("ipo", "tau", 0),
]
OUT_OF_RANGE += [
    ("radpo", "level", 0.0),
    ("radpo", "level", 1.5),
    ("hdpo", "alpha", 0.0),
    ("fdpo", "alpha", 1.5),
]
OUT_OF_RANGE += [("fdpo", "divergence", "pearson_chi2"), ("fdpo", "divergence", "total_variation")]


@pytest.mark.parametrize(("name", "field", "value"), OUT_OF_RANGE)
def test_hyper_parameters_out_of_range_are_refused(name, field, value):
    module, cls, _ = locate(name)
    with pytest.raises((ValueError, ConfigError)):
        getattr(import_module(module), cls)(**{field: value})
