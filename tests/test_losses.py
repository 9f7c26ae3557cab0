"""The losses' door: torch and pydantic are all it needs."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

SCRIPT = """
import sys

BLOCKED = set({blocked!r})

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{{name}} is not installed")

sys.meta_path.insert(0, Absent())
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("transformers is still there")

import torch
from alignkit import losses
from alignkit.losses import hdpo_loss

for name in losses.__all__:
    exec(f"from alignkit.losses import {{name}}")

chosen = torch.tensor([-1.0], requires_grad=True)
rejected, half = torch.tensor([-2.0], requires_grad=True), torch.tensor([-1.5])
loss = hdpo_loss(chosen, rejected, half, half, beta=0.5, alpha=0.8)
loss.sum().backward()
print(len(losses.__all__), loss.item(), chosen.grad.item(), rejected.grad.item())
"""


def needed(*names: str) -> set[str]:
    """These distributions and everything that they need, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # a marker that does not hold here
            continue
        waiting += [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return found


def test_every_loss_is_imported_and_used_with_torch_and_pydantic_alone():
    kept = needed("torch", "pydantic")
    others = {
        module for module, owners in packages_distributions().items()
        if not kept & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} and module not in ("alignkit", "setuptools")
    }  # fmt: skip
    assert {
        "transformers",
        "trl",
        "peft",
        "datasets",
        "accelerate",
        "omegaconf",
        "typer",
        "rich",
        "numpy",
    } <= others
    script = SCRIPT.format(blocked=sorted(others))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, loss, chosen, rejected = done.stdout.split()
    assert int(count) >= 15
    # margin 0.5 * (0.8 * (-1 + 2) - 0) = 0.4; -log sigmoid(0.4) and its derivatives -+ 0.5 * 0.8 *
    # sigmoid(-0.4)
    assert abs(float(loss) - 0.5130152) < 1e-6
    assert abs(float(chosen) + 0.4 * 0.4013123) < 1e-6
    assert abs(float(rejected) - 0.4 * 0.4013123) < 1e-6
