"""A weighted list of objectives: every field of its parts' plans has a rule, and none is lost."""

from dataclasses import dataclass, fields
from functools import partial

import pytest
import torch

from alignkit import DPO, KLPPO, KTO, SFT, TDPO, TREG, HyPO
from alignkit.batches import FAMILIES, Bundle
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective, Weighted
from alignkit.objectives.preference.accelerated_po import AcceleratedPO
from alignkit.objectives.preference.radpo import RaDPO
from alignkit.plan import COMBINATION, Draw, Plan, combined


def weighted(*parts: Objective) -> Plan:
    return Weighted(parts=[(part, 1.0) for part in parts]).plan


def test_every_field_has_a_rule():
    assert COMBINATION.keys() == {field.name for field in fields(Plan)}


def test_a_field_without_a_rule_is_refused():
    @dataclass(frozen=True)
    class NewPlan(Plan):
        teacher: str | None = None

    with pytest.raises(ConfigError, match=r"Plan\.teacher has no rule"):
        combined([NewPlan("pair"), NewPlan("pair", teacher="large")], "pair")


OTHER = {
    "data": "labelled",
    "statistics": {"kl": torch.add},
    "without_anchor": ("entropy",),
    "anchors": ("reference", "target"),
    "samples": (Draw(2),),
    "feedback": "table",
    "values": True,
    "rewards": True,
    "partition": True,
    "bins": 8,
    "epochs": 2,
    "minibatches": 2,
    "credit_reads_policy": False,
    "coupled": True,
    "mismatched": True,
    "update": "extragradient",
    "outputs": 1,
    "prefixes": {"better": "Be good."},
    "joined": True,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Plan)])
def test_no_field_that_one_part_asks_for_is_lost(name):
    """Either the sum has it, or the list is refused."""
    changed = Plan(**{"data": "pair", name: OTHER[name]})
    if COMBINATION[name] == "agree":
        with pytest.raises(ConfigError, match=f"disagree on `{name}`"):
            combined([Plan("pair"), changed], "pair")
        assert getattr(combined([changed, changed], "pair"), name) == OTHER[name]
    elif name != "data":
        assert getattr(combined([Plan("pair"), changed], "pair"), name) == OTHER[name]
        assert getattr(combined([changed, Plan("pair")], "pair"), name) == OTHER[name]


def test_demonstrations_join_pairs_and_nothing_else():
    assert weighted(SFT(), DPO()) == Plan("pair")
    assert weighted(SFT(), SFT()).data == "sequence"
    for parts in ((SFT(), KTO()), (DPO(), KTO()), (SFT(), KLPPO())):
        with pytest.raises(ConfigError, match="needs one data family"):
            weighted(*parts)


def test_sampled_completions_have_to_agree():
    assert weighted(HyPO(), SFT()).samples == HyPO().plan.samples
    with pytest.raises(ConfigError, match="disagree on `samples`"):
        weighted(HyPO(), DPO())


def test_one_name_means_one_thing():
    assert set(weighted(RaDPO(level=0.5), RaDPO(level=0.5), TDPO()).statistics) == {
        "risk_cvar_0.5",
        "forward_kl",
    }
    # the statistics' names carry six digits of the level, the functions all of them
    with pytest.raises(ConfigError, match=r"mean different things by `risk_cvar_0\.5`"):
        weighted(RaDPO(level=0.5), RaDPO(level=0.5 + 1e-9))
    with pytest.raises(ConfigError, match="mean different things by `better`"):
        weighted(TREG(), TREG(better="Be kind.\n"))
    same = [Plan("pair", statistics={"kl": partial(torch.add, alpha=a)}) for a in (1, 1)]
    assert set(combined(same, "pair").statistics) == {"kl"}


def test_statistics_read_the_anchor_that_their_part_reads():
    """The loop gives statistics the first anchor of the plan, whichever part stands first."""
    assert AcceleratedPO().plan.anchors == ("target", "previous")
    for parts in ((AcceleratedPO(), TDPO()), (TDPO(), AcceleratedPO())):
        assert weighted(*parts).anchors == ("reference", "target", "previous")
    plans = [
        Plan("pair", statistics={name: torch.add}, anchors=(name,))
        for name in ("reference", "target")
    ]
    with pytest.raises(ConfigError, match="read different anchors, reference and target"):
        combined(plans, "pair")


def test_families_say_what_their_data_hold():
    assert {name for name, family in FAMILIES.items() if family.sampled} == {"rollout", "game"}
    ids = torch.tensor([1])
    answer = torch.tensor([1, 2])
    bundle = Bundle(ids, [answer, answer], [answer > 0, answer > 1])
    assert FAMILIES["rollout"].batch.counts([bundle]) == {"rows": 2, "tokens": 3}
    assert FAMILIES["pair"].batch.counts([bundle]) == {"rows": 1, "tokens": 2}
