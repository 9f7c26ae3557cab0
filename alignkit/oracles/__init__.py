"""Exact answers that objectives and algorithms are checked against. Names load lazily."""

from importlib import import_module

_LAZY = {"optimum": "optima", "regularized_nash": "games", "duality_gap": "games"}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"alignkit.oracles.{_LAZY[name]}"), name)
    raise AttributeError(f"alignkit.oracles has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
