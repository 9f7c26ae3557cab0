"""The sampling engine that a recipe's `rollout` section asks for."""

from typing import TYPE_CHECKING

from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError
from alignkit.rollout.protocol import Models, Sampler

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_sampler(
    config: RolloutConfig,
    models: Models,
    *,
    seed: int,
    exact: bool = True,
    temperature: float = 1.0,
    accelerator: "Accelerator | None" = None,
) -> Sampler:
    """The engine that the recipe's `rollout` section asks for.

    `exact` (the caller trains on the log-probs) refuses what the trainer's log-probs do not
    describe: another `temperature` than theirs, and top_p below 1, under which tokens outside the
    nucleus have no importance weight at all. A server on this machine gets its weights from the
    first process of the machine, one elsewhere from the first of all. Raises ConfigError.
    """
    described = {"temperature": temperature, "top_p": 1.0}
    for name, value in described.items():
        if exact and getattr(config, name) != value:
            raise ConfigError(
                f"rollout.{name}: {getattr(config, name)} samples from another distribution than "
                f"the one that the policy's log-probs describe; training needs {value}"
            )

    if config.engine == "hf":
        from alignkit.rollout.hf import HFSampler

        return HFSampler(
            models,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed,
        )

    from alignkit.rollout.colocated import start_servers
    from alignkit.rollout.vllm import VLLMSampler

    # http means servers on this machine, to which its first process gives the weights.
    elsewhere = any(url.startswith("https:") for url in config.urls)
    pushes = True
    if accelerator is not None:
        pushes = accelerator.is_main_process if elsewhere else accelerator.is_local_main_process
    sleeps = False
    if config.colocate:
        sleeps = accelerator is not None and accelerator.device.type == "cuda"
        if pushes:
            start_servers(config, models, sleeps=sleeps)
    return VLLMSampler(models, config, seed=seed, pushes=pushes, sleeps=sleeps)
