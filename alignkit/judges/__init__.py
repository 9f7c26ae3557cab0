"""Judges: which of two completions is better, with what probability, and whether the answer counts.

Names load lazily: the recipe's `judge` section imports no torch.
"""

from importlib import import_module

_WHERE = {
    "Verdict": "base",
    "Judge": "base",
    "BothOrders": "base",
    "BradleyTerry": "base",
    "as_trl_judge": "trl_style",
    "from_trl_judge": "trl_style",
    "ChatJudge": "chat",
    "load_judge": "load",
    "JudgeConfig": "config",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(import_module(f"alignkit.judges.{_WHERE[name]}"), name)
    raise AttributeError(f"alignkit.judges has no {name!r}; it has {', '.join(__all__)}")
