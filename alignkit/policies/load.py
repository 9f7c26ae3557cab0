"""Loading models and tokenizers into what a run trains, with checks of what would go wrong later.

`load_pair` gives the policy pair of a recipe. With shards, no process ever holds a whole model: see
`alignkit.policies.meta`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from alignkit.batches import Bundle, Plan
from alignkit.config.adapter_kinds import ADAPTER_FILE
from alignkit.config.model import ModelConfig, ReferenceConfig, TargetConfig, check_source
from alignkit.errors import ConfigError, ModelError, first_line
from alignkit.policies.adapters import (
    add_adapter,
    base_of,
    starts_without,
    tokenizer_source,
    with_adapter,
)
from alignkit.policies.export import dtype_to_save
from alignkit.policies.layout import Layout
from alignkit.policies.live import DTYPES, adopt, config_without_dropout
from alignkit.policies.made_up import check_made_up
from alignkit.policies.meta import Weights, as_if_loaded, without_weights
from alignkit.policies.module import PolicyModule, causal_lm, frozen
from alignkit.policies.pair import PolicyPair
from alignkit.policies.probe import check_head, choose_layout, probe_bundle, probe_rows
from alignkit.policies.quantized import keep_differentiable, quantized
from alignkit.policies.reference import KINDS, Anchor, following_anchors, resolve_kind
from alignkit.policies.reward_head import start_reward_head
from alignkit.policies.router import router_of
from alignkit.policies.sharding import Shards
from alignkit.policies.tokenizer import check_vocabulary, load_tokenizer, padded, same_vocabulary
from alignkit.policies.vocabulary import add_tokens
from alignkit.policies.weights import check_files


def load_model(
    model: ModelConfig,
    *,
    device: torch.device | str,
    dtype: str = "float32",
    outputs: int = 0,
    field: str = "model.name_or_path",
) -> tuple[Any, dict[str, float]]:
    """A causal LM without dropout, in evaluation mode, and the dropout rates its config had.

    With `outputs`, a sequence classifier instead: the model's backbone under a fresh head of that
    many numbers per text. `field` of the recipe names the model in errors. Raises ModelError.
    """
    with _explained(model, field):
        config, rates = _config(model, outputs)
        auto: Any = AutoModelForSequenceClassification if outputs else AutoModelForCausalLM
        options = _options(model, dtype)
        few_bits = quantized(model, device, options["dtype"])
        loaded, report = auto.from_pretrained(
            model.name_or_path,
            config=config,
            revision=model.revision,
            output_loading_info=True,
            **options,
            **few_bits,
        )
    check_made_up(loaded, report, model.name_or_path, field, head=not outputs)
    if not outputs:
        _check_writes(loaded, model, field)
    keep_differentiable(loaded)
    return (loaded if few_bits else loaded.to(device)).eval(), rates


def load_without_weights(
    model: ModelConfig, *, dtype: str = "float32", field: str = "model.name_or_path"
) -> tuple[Any, dict[str, float], Weights]:
    """As `load_model`, but with parameters on the meta device, and what can fill them after they
    are spread over the processes.
    """
    with _explained(model, field):
        config, rates = _config(model, 0)
        options = _options(model, dtype)
        weights = options.pop("dtype")
        loaded = without_weights(
            AutoModelForCausalLM, config, model.name_or_path, weights, **options
        )
        _check_writes(loaded, model, field)
        return loaded, rates, Weights(loaded, model.name_or_path, model.revision)


@contextmanager
def _explained(model: ModelConfig, field: str) -> Iterator[None]:
    """Loading inside the block raises ModelError alone."""
    check_source(model.name_or_path, field)
    if Path(model.name_or_path).is_dir():
        check_files(Path(model.name_or_path), field)
    # A bar per load would disturb the run's own display.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # loaders raise anything, from OSError to SafetensorError
        raise ModelError(
            f"{field}: {model.name_or_path} could not be loaded: {first_line(error)}"
        ) from error


def _config(model: ModelConfig, outputs: int) -> tuple[Any, dict[str, float]]:
    """The model's config with its dropout switched off, and the rates that it had."""
    config = AutoConfig.from_pretrained(
        model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    if getattr(config, "alignkit_outputs", None) and not outputs:
        raise ValueError(
            "it is a reward or preference model, which writes nothing; name it under `rewards` "
            "or `judge`"
        )
    rates = config_without_dropout(config)
    if outputs:
        config.num_labels = outputs
    return config, rates


def _options(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """What transformers is told besides the config."""
    kernel = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    weights = DTYPES[dtype if model.dtype == "auto" else model.dtype]
    return {"dtype": weights, "trust_remote_code": model.trust_remote_code, **kernel}


def _check_writes(loaded: Any, model: ModelConfig, field: str) -> None:
    if loaded.get_output_embeddings() is None:
        raise ModelError(
            f"{field}: {model.name_or_path} has no language-model head; give a causal "
            "language model"
        )


def load_frozen(
    model: ModelConfig, field: str, *, device: torch.device | str, dtype: str = "float32"
) -> tuple[Any, Any]:
    """A causal LM that is not trained, from a model or adapter folder or the hub, and its
    tokenizer. `field` of the recipe names it in errors. Raises ModelError.

    An adapter names the model that it belongs on; its folder may hold a tokenizer of its own.
    """
    base, folder, words = _parts(model, field)
    loaded, _ = load_model(base, device=device, dtype=dtype, field=field)
    if folder is not None:
        loaded = with_adapter(loaded, folder, field).eval()
    return loaded, load_tokenizer(words, field)


def load_anchor(
    model: ModelConfig,
    field: str,
    *,
    device: torch.device | str,
    dtype: str,
    shards: Shards | None,
) -> tuple[PolicyModule, Any]:
    """What `load_frozen` loads as an anchor, spread over the processes where there are shards, and
    its tokenizer.
    """
    if shards is None:
        loaded, tokenizer = load_frozen(model, field, device=device, dtype=dtype)
        return frozen(PolicyModule(loaded)), tokenizer

    base, folder, words = _parts(model, field)
    loaded, _, weights = load_without_weights(base, dtype=dtype, field=field)
    if folder is not None:
        with as_if_loaded(loaded):
            loaded = with_adapter(loaded, folder, field)
    module = frozen(PolicyModule(loaded))
    shards.place(module, partial(weights.fill, device))
    return module, load_tokenizer(words, field)


def _parts(model: ModelConfig, field: str) -> tuple[ModelConfig, Path | None, ModelConfig]:
    """The model itself, the folder of the adapter that goes on it, if any, and where the tokenizer
    is.
    """
    folder = Path(model.name_or_path).expanduser()
    if not (folder / ADAPTER_FILE).is_file():
        return model, None, model
    base = base_of(folder, model, field)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return base, folder, model if has_tokenizer else base


def _reference_model(
    path: str,
    policy: nn.Module,
    tokenizer: Any,
    model: ModelConfig,
    device: torch.device | str,
    dtype: str,
    shards: Shards | None,
) -> PolicyModule:
    """The reference at a path; ModelError unless its tokens mean what the policy's mean."""
    source = model.model_copy(update={"name_or_path": path, "revision": None, "adapter": None})
    check_source(path, "reference.kind")
    module, other = load_anchor(source, "reference.kind", device=device, dtype=dtype, shards=shards)
    if not same_vocabulary(other, tokenizer):
        raise ModelError(
            f"reference.kind: the tokenizer of {path} ({len(other)} tokens) is not the policy's "
            f"({len(tokenizer)} tokens): log-probs of different tokens cannot be compared; choose "
            "a reference from the same family"
        )

    own, theirs = (causal_lm(m).config.get_text_config().vocab_size for m in (policy, module.model))
    if own != theirs:
        raise ModelError(
            f"reference.kind: {path} has a vocabulary of {theirs}, the policy one of {own}; they "
            "must be the same"
        )
    return module


@dataclass
class _Start:
    """What training starts from: the causal LM, the same with its adapter if it has one, the
    tokenizer, the config's dropout rates, and weights that are still to be read.
    """

    loaded: Any
    policy: Any
    tokenizer: Any
    dropout: dict[str, float]
    weights: Weights | None = None


def _start(
    model: ModelConfig,
    live: tuple[Any, Any] | None,
    device: torch.device | str,
    dtype: str,
    seed: int,
    *,
    sharded: bool,
) -> _Start:
    if model.attention == "flex_attention" and torch.device(device).type == "cpu":
        raise ConfigError(
            "model.attention: flex_attention cannot train on a CPU (torch has no backward for it "
            "there); use sdpa"
        )
    start = _loaded_or_adopted(model, live, device, dtype, sharded)
    loaded = start.loaded
    check_vocabulary(loaded, start.tokenizer, model.name_or_path)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    if model.adapter is not None:
        with as_if_loaded(loaded) if start.weights else nullcontext():
            start.policy = add_adapter(loaded, model.adapter, seed=seed)
    return start


def _loaded_or_adopted(
    model: ModelConfig,
    live: tuple[Any, Any] | None,
    device: torch.device | str,
    dtype: str,
    sharded: bool,
) -> _Start:
    if live is not None:
        if model.add_tokens:
            raise ConfigError(
                "model.add_tokens: add them to the tokenizer and the model that you give, with "
                "tokenizer.add_tokens and model.resize_token_embeddings"
            )
        tokenizer = padded(deepcopy(live[1]), model.name_or_path)
        loaded, adapted, dropout = adopt(live[0], model, device=device, dtype=dtype)
        # A live model may have an adapter already.
        return _Start(loaded, loaded if adapted is None else adapted, tokenizer, dropout)

    tokenizer = load_tokenizer(tokenizer_source(model))
    if sharded:
        if model.add_tokens or model.quantize != "none":
            raise ConfigError(
                "model.add_tokens, model.quantize: not with train.shard, which spreads the weights "
                "as their files hold them; prepare such a model first, or train without shards"
            )
        loaded, dropout, weights = load_without_weights(model, dtype=dtype)
        return _Start(loaded, loaded, tokenizer, dropout, weights)
    loaded, dropout = load_model(model, device=device, dtype=dtype)
    if model.add_tokens:
        add_tokens(loaded, tokenizer, model.add_tokens)
    return _Start(loaded, loaded, tokenizer, dropout)


def _probe(base: PolicyModule) -> Bundle:
    text = causal_lm(base.model).config.get_text_config()
    window = max((w for w in base.windows.values() if w), default=None)
    return probe_bundle(text.vocab_size, window, getattr(text, "max_position_embeddings", None))


def _probed(base: PolicyModule, model: ModelConfig, bundle: Bundle) -> tuple[Layout, str]:
    """The layout of the policy's rows, with a note: a few log-probs are computed both ways, before
    any time is spent on training.
    """
    check_head(base, bundle)
    return choose_layout(base, model.layout, bundle)


def _trained_module(start: _Start, plan: Plan, model: ModelConfig, seed: int) -> PolicyModule:
    """The policy with the heads that the plan asks for. ConfigError where the values are to be
    rewards, saved with the model, and there is an adapter.
    """
    if plan.rewards and model.adapter is not None:
        raise ConfigError(
            "model.adapter: a model that is a reward too is trained whole, so that its files are a "
            "classifier's; leave the adapter out"
        )
    module = PolicyModule(start.policy, values=plan.values, rewards=plan.rewards, bins=plan.bins)
    if module.value_head is not None and plan.rewards:
        start_reward_head(module.value_head, start.policy.config, seed)
    return module.eval()


def load_pair(
    model: ModelConfig,
    reference: ReferenceConfig,
    target: TargetConfig | None,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    fixed_data: bool,
    seed: int = 0,
    live: tuple[Any, Any] | None = None,
    router_aux_loss: float | Literal["auto"] = "auto",
    temperature: float = 1.0,
    shards: Shards | None = None,
) -> PolicyPair:
    """The policy with its reference and target, ready to train.

    `dtype` is the weights' dtype where `model.dtype` is auto. `fixed_data`: completions are known
    before training, so the reference can be scored once. `live` is a model (perhaps peft's) with
    its tokenizer, trained in place of what `model` names. `router_aux_loss` weighs the routers' loss
    of mixtures of experts. `temperature` divides the logits of policy and anchors. With `shards`,
    each process reads its own slices; all have to call this. Raises ModelError, ConfigError.
    """
    start = _start(model, live, device, dtype, seed, sharded=shards is not None)
    base = _trained_module(start, plan, model, seed)
    if shards is not None and start.weights is not None:
        shards.place(base, partial(start.weights.fill, device))
    probe = _probe(base)
    layout, about_layout = _probed(base, model, probe)
    base.router, about_router = router_of(start.loaded, router_aux_loss)
    notes = [note for note in (about_layout, about_router) if note]
    base.temperature = temperature  # before anchors are copied from it
    if temperature != 1:
        notes.append(
            f"the policy is trained and its KL measured at temperature {temperature:g}; sample "
            "from the model at this temperature"
        )

    apart = start.policy is not start.loaded and starts_without(base, probe_rows(base, probe))
    kind = resolve_kind(reference.kind, plan, adapter=apart, fixed_data=fixed_data)
    anchors = {}
    if kind in KINDS:
        anchors["reference"] = Anchor.of(kind, base, reference, shards)
    elif kind != "none":
        other = _reference_model(kind, start.loaded, start.tokenizer, model, device, dtype, shards)
        other.temperature = temperature
        anchors["reference"] = Anchor("frozen", other)

    anchors |= following_anchors(target or TargetConfig(), plan, base, shards)
    return PolicyPair(
        base,
        start.tokenizer,
        anchors,
        layout=layout,
        notes=notes,
        save_config=start.dropout,
        save_dtype=dtype_to_save(model, of=None if live is None else live[0]),
        shards=shards,
    )
