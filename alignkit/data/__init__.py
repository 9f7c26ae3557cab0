"""Rows in, bundles out. Names load lazily: importing the room imports neither torch nor datasets."""

from importlib import import_module

_LAZY = {
    "DataConfig": "alignkit.config.data",
    "Report": "alignkit.data.report",
    "Prompt": "alignkit.data.load",
    "load_bundles": "alignkit.data.load",
    "load_prompts": "alignkit.data.load",
    "check": "alignkit.data.load",
    "fingerprint": "alignkit.data.load",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"alignkit.data has no {name!r}; it has {', '.join(__all__)}")
