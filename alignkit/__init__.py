"""alignkit: KL-regularised RLHF and preference optimisation. Names load lazily: `import alignkit`
imports no torch.
"""

from importlib import import_module

from alignkit.objectives import OBJECTIVES, locate

__version__ = "0.1.0"

_LAZY = {cls: module for module, cls, _ in map(locate, OBJECTIVES)}
_LAZY |= {
    "gae": "alignkit.credit",
    "PolicyPair": "alignkit.policies.pair",
    "AlignkitError": "alignkit.errors",
}
_LAZY |= {"load_recipe": "alignkit.config.recipe", "run_recipe": "alignkit.runs.launch"}
_LAZY |= {
    "train": "alignkit.runs.from_python",
    "evaluate": "alignkit.evaluation.from_python",
    "compare": "alignkit.comparison.from_python",
}
_MODULES = ("losses", "kl", "risk", "divergences", "testing", "oracles")
__all__ = sorted([*_LAZY, "__version__", *_MODULES])


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"alignkit.{name}")
    raise AttributeError(f"alignkit has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
