"""Rewards in TRL's signature: functions, reward models,
verifiers in their own processes, length and format.

Names load lazily: the recipe's `rewards` section imports no torch.
"""

from importlib import import_module

_WHERE = {
    "Reward": "combine",
    "load_rewards": "load",
    "load_reward_model": "load",
    "RewardConfig": "alignkit.config.rewards",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name in _WHERE:
        module = _WHERE[name]
        return getattr(
            import_module(module if "." in module else f"alignkit.rewards.{module}"), name
        )
    raise AttributeError(f"alignkit.rewards has no {name!r}; it has {', '.join(__all__)}")
