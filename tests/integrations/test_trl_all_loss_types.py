"""Every loss type of TRL's `DPOTrainer`: alignkit's loop gives the same loss and gradient. The adapter
is held against the same list in `test_trl_parity.py`.
"""

import inspect
import re
from dataclasses import replace
from importlib.metadata import version

import pytest
from native_world import move, native, pair_bundles
from packaging.version import Version
from test_trl_forms import check_equal, trl_loss
from trl import DPOTrainer
from trl_loss_types import LOSS_TYPES, NAMES
from trl_world import dpo_trainer

pytestmark = pytest.mark.skipif(
    Version(version("trl")) < Version("1.16"), reason="alignkit's forms are held against TRL 1.16"
)


def test_the_list_is_complete():
    source = inspect.getsource(inspect.getmodule(DPOTrainer))
    of_trl = set(re.findall(r'loss_type == "(\w+)"', source))
    assert len(of_trl) >= 15
    assert of_trl == {loss_type for _, loss_type, _ in LOSS_TYPES}


@pytest.mark.parametrize(("objective", "loss_type", "settings"), LOSS_TYPES, ids=NAMES)
def test_natively(model, tmp_path, objective, loss_type, settings):
    theirs = {"loss_type": loss_type, "beta": 0.3, "per_device_train_batch_size": 4, **settings}
    trainer = dpo_trainer(DPOTrainer, model, tmp_path, **theirs)
    pair, reducer = native(model, objective)
    # Not far: forward_kl's exp(-log_ratio) multiplies the rounding of large log-ratios.
    move(pair.base.model, trainer.model, by=0.02)

    inputs = next(iter(trainer.get_train_dataloader()))
    bundles = pair_bundles(inputs)
    if objective.plan.data == "sequence":  # learns from the chosen responses alone
        bundles = [
            replace(bundle, completions=bundle.completions[:1], masks=bundle.masks[:1])
            for bundle in bundles
        ]
    check_equal(trainer, trl_loss(trainer, inputs), pair, reducer.backward(bundles))
