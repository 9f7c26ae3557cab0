"""Sampling of completions. Names load lazily: the recipe's `rollout` section imports no torch."""

from importlib import import_module

_WHERE = {
    "Sample": "protocol",
    "Sampler": "protocol",
    "Models": "protocol",
    "make_sampler": "engines",
    "HFSampler": "hf",
    "VLLMSampler": "vllm",
    "OneModel": "generate",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(import_module(f"alignkit.rollout.{_WHERE[name]}"), name)
    raise AttributeError(f"alignkit.rollout has no {name!r}; it has {', '.join(__all__)}")
