"""From a `decode` section to a decoder: models are loaded and checked, rewards looked up."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from alignkit.config.decode import DecodeConfig
from alignkit.decoding.decoders import Decoder, PoolDecoder, RejectionDecoder, TokenDecoder
from alignkit.decoding.particle_decoder import VALUE, ParticleDecoder
from alignkit.decoding.scoring import Scorer
from alignkit.decoding.smc import Schedule
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.module import causal_lm
from alignkit.policies.tokenizer import same_vocabulary
from alignkit.rewards.call import RewardCall
from alignkit.rewards.load import load_rewards
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.protocol import Models


@dataclass(frozen=True)
class NamedModels:
    """`Models` by their names: those of `pair` (policy and reference), and others beside them.

    ModelError where one has another vocabulary than the policy.
    """

    pair: Models
    others: Mapping[str, OneModel]

    def __post_init__(self) -> None:
        with self.pair.model("policy") as policy:
            size = _vocabulary_size(policy)
        for name, other in self.others.items():
            same = same_vocabulary(self.tokenizer, other.tokenizer)
            if not same or _vocabulary_size(other.network) != size:
                raise ModelError(
                    f"decode: {name} has another vocabulary than the model ({len(other.tokenizer)} "
                    f"and {len(self.tokenizer)} tokens); models that sample together need one"
                )

    @property
    def tokenizer(self) -> Any:
        """The one tokenizer of all."""
        return self.pair.tokenizer

    def together(self) -> AbstractContextManager[None]:
        """As the pair's."""
        return self.pair.together()

    @contextmanager
    def model(self, name: str = "policy") -> Iterator[nn.Module]:
        """The model of that name, in evaluation mode inside the block."""
        source: Models = self.others.get(name, self.pair)
        with source.model(name) as model:
            yield model


def _vocabulary_size(network: Any) -> int:
    inner: Any = causal_lm(network)
    return int(inner.config.get_text_config().vocab_size)


def make_decoder(
    config: DecodeConfig,
    pair: Models,
    *,
    reward: RewardCall | None,
    max_new_tokens: int,
    seed: int = 0,
    safe: bool = False,
    load: Callable[[str], OneModel] | None = None,
    load_value: Callable[[str, float], OneModel] | None = None,
) -> Decoder:
    """The decoder that the section describes.

    pair            has the section's model as "policy", and as "reference" what KL is measured to
    reward          what the decoder goes by, where the section names no `rewards`
    max_new_tokens  the cap on a completion, where the section has none
    load            gives the model of a name, for `weights`
    load_value      gives the learned value of a run at a beta (`alignkit.runs.learned_value`)

    ConfigError where nothing says by which reward to decode, ModelError for models that do not
    share a vocabulary.
    """
    cap = config.max_new_tokens or max_new_tokens
    if config.rewards:
        reward = load_rewards(config.rewards, safe=safe)
    if config.asks_reward and reward is None:
        raise ConfigError(
            f"decode: nothing says by which reward {config.method} chooses; give decode.rewards, or "
            "the score to measure (--reward)"
        )

    models = NamedModels(pair, _others(config, load, load_value))
    if config.method in ("sample", "fuse", "guide"):
        return _token_decoder(config, models, cap, seed)

    assert reward is not None
    scorer = Scorer(reward, pair.tokenizer)
    sampler = HFSampler(pair, max_new_tokens=cap, seed=seed)
    if config.method == "smc":
        return _particle_decoder(config, models, scorer, cap, seed)
    if config.method == "reject":
        assert config.beta is not None
        assert config.bound is not None
        return RejectionDecoder(sampler, scorer, config.beta, config.bound, config.tries)
    assert config.n is not None
    return PoolDecoder(sampler, scorer, config.n, config.beta)


def _others(
    config: DecodeConfig,
    load: Callable[[str], OneModel] | None,
    load_value: Callable[[str, float], OneModel] | None,
) -> dict[str, OneModel]:
    """The models that sample beside the policy and the reference, by the names of `weights`."""
    others: dict[str, OneModel] = {}
    for name in config.weights:
        if name not in ("policy", "reference"):
            assert load is not None
            others[name] = load(name)

    value = config.value or config.learned_twist
    if value is not None:
        assert load_value is not None
        assert config.beta is not None
        others[VALUE] = load_value(value, config.beta)
    return others


def _token_decoder(config: DecodeConfig, models: NamedModels, cap: int, seed: int) -> TokenDecoder:
    guided = {"policy": 1.0, VALUE: 1.0}  # p e^(Q / beta), normalised token by token
    weights = guided if config.method == "guide" else dict(config.weights)
    sampler = HFSampler(
        models,
        max_new_tokens=cap,
        temperature=config.temperature,
        top_p=config.top_p,
        cost=config.cost,
        order=config.order,
        surprise=config.surprise,
        seed=seed,
        measured=True,
    )
    return TokenDecoder(sampler, weights)


def _particle_decoder(
    config: DecodeConfig, models: NamedModels, scorer: Scorer, cap: int, seed: int
) -> ParticleDecoder:
    assert config.particles is not None
    assert config.beta is not None

    # Particles ask the head for few of the tokens, so its model gives states in the place of values.
    value = None
    if config.learned_twist is not None:
        network: Any = models.others[VALUE].network
        value = network.get_output_embeddings()
        network.set_output_embeddings(nn.Identity())
    guided = value is not None and config.proposal != "base"

    # The reward of the text so far is divided by the same beta unless another is given.
    twist_beta = (config.twist_beta or config.beta) if config.twist == "reward" else None
    return ParticleDecoder(
        models,
        scorer,
        Schedule(config.particles, cap, config.every, config.ess, guided),
        config.beta,
        twist_beta=twist_beta,
        value=value,
        fresh=config.fresh,
        seed=seed,
    )
