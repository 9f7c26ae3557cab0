"""TRL's loss types of pairs and their settings, beside the objectives that alignkit gives them."""

from alignkit.objectives.preference.aot import AOT
from alignkit.objectives.preference.apo import APODown, APOZero
from alignkit.objectives.preference.bco_pair import BCOPair
from alignkit.objectives.preference.discopop import DiscoPOP
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.exo_pair import EXOPair
from alignkit.objectives.preference.fdpo import FDPO
from alignkit.objectives.preference.hinge import Hinge
from alignkit.objectives.preference.ipo import IPO
from alignkit.objectives.preference.lddpo import LDDPO
from alignkit.objectives.preference.nca_pair import NCAPair
from alignkit.objectives.preference.robust import RobustDPO
from alignkit.objectives.preference.sft import SFT
from alignkit.objectives.preference.sigmoid_norm import SigmoidNorm
from alignkit.objectives.preference.sppo_hard import SPPOHard

LOSS_TYPES = [
    (Hinge(beta=0.3), "hinge", {}),
    (IPO(tau=0.3, form="mean"), "ipo", {}),
    (EXOPair(beta=0.3), "exo_pair", {"label_smoothing": 1e-3}),
    (NCAPair(beta=0.3), "nca_pair", {}),
    (RobustDPO(beta=0.3, label_smoothing=0.1), "robust", {"label_smoothing": 0.1}),
    (BCOPair(beta=0.3), "bco_pair", {}),
    (SPPOHard(beta=0.3), "sppo_hard", {}),
    (AOT(beta=0.3, label_smoothing=0.1), "aot", {"label_smoothing": 0.1}),
    (AOT(beta=0.3, form="unpaired"), "aot_unpaired", {}),
    (APOZero(beta=0.3), "apo_zero", {}),
    (APODown(beta=0.3), "apo_down", {}),
    (DiscoPOP(beta=0.3, discopop_tau=0.2), "discopop", {"discopop_tau": 0.2}),
    (SigmoidNorm(beta=0.3), "sigmoid_norm", {}),
    (LDDPO(beta=0.3, alpha=0.5), "sigmoid", {"ld_alpha": 0.5}),
    (FDPO(beta=0.3, divergence="forward_kl"), "sigmoid", {"f_divergence_type": "forward_kl"}),
    (
        FDPO(beta=0.3, divergence="jensen_shannon"),
        "sigmoid",
        {"f_divergence_type": "js_divergence"},
    ),
    (SFT(), "sft", {}),
    (DPO(beta=0.3, weighting="wpo"), "sigmoid", {"use_weighting": True}),
    (IPO(tau=0.3, form="mean", weighting="wpo"), "ipo", {"use_weighting": True}),
    (APOZero(beta=0.3, weighting="wpo"), "apo_zero", {"use_weighting": True}),
]
NAMES = ["-".join([name, *settings]) for _, name, settings in LOSS_TYPES]
