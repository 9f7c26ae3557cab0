"""Every pure loss function, importable with torch and pydantic alone: the stable path for other
trainers and for papers.

Each takes log-probs (four [B] tensors for pairs) and keyword hyper-parameters and returns one value
per row or token.
"""

from importlib import import_module

from alignkit.objectives import FUNCTIONS, OBJECTIVES, locate

_FUNCTIONS = {
    name: module
    for module, _, names in map(locate, OBJECTIVES)
    for name in names.split(",")
    if name
}
_FUNCTIONS |= {name: f"alignkit.objectives.{module}" for name, module in FUNCTIONS.items()}
__all__ = sorted(_FUNCTIONS)


def __getattr__(name: str) -> object:
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"alignkit.losses has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
