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
    "JudgeConfig": "alignkit.config.judges",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name in _WHERE:
        module = _WHERE[name]
        return getattr(
            import_module(module if "." in module else f"alignkit.judges.{module}"), name
        )
    raise AttributeError(f"alignkit.judges has no {name!r}; it has {', '.join(__all__)}")
