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
    truncates: bool = False,
    accelerator: "Accelerator | None" = None,
) -> Sampler:
    """The engine that the recipe's `rollout` section asks for.

    `exact` (the caller trains on the log-probs) refuses what the trainer's log-probs do not
    describe: another `temperature` than theirs, and top_k, top_p and min_p, unless the caller
    `truncates`, because it learns with the sampler's own log-probs as the behaviour. A server on
    this machine gets its weights from the first process of the machine, one elsewhere from the
    first of all. Raises ConfigError.
    """
    if exact and config.temperature != temperature:
        raise ConfigError(
            f"rollout.temperature: {config.temperature} samples from another distribution than "
            f"the one that the policy's log-probs describe; training needs {temperature}"
        )
    if exact and config.truncation and not truncates:
        raise ConfigError(
            f"rollout: {', '.join(config.truncation)} samples from another distribution than the "
            "one that the policy's log-probs describe, and this objective does not weigh its "
            "samples by the sampler's log-probs; leave it out"
        )

    if config.engine == "hf":
        from alignkit.rollout.hf import HFSampler

        return HFSampler(
            models,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            stop=config.stop,
            seed=seed,
        )

    return _on_servers(config, models, seed, accelerator)


def _on_servers(
    config: RolloutConfig, models: Models, seed: int, accelerator: "Accelerator | None"
) -> Sampler:
    """vLLM servers, started first where the run has to."""
    from alignkit.rollout.colocated import start_servers
    from alignkit.rollout.transfer_ways import check_gpu
    from alignkit.rollout.vllm import VLLMSampler

    # http means servers on this machine, to which its first process gives the weights.
    elsewhere = any(url.startswith("https:") for url in config.urls)
    pushes = True
    if accelerator is not None:
        pushes = accelerator.is_main_process if elsewhere else accelerator.is_local_main_process
    with models.model("policy") as model:
        check_gpu(config, next(model.parameters()).device)
    sleeps = False
    if config.colocate:
        sleeps = accelerator is not None and accelerator.device.type == "cuda"
        if pushes:
            start_servers(config, models, sleeps=sleeps)
    return VLLMSampler(models, config, seed=seed, pushes=pushes, sleeps=sleeps)
