"""Loading models and tokenizers into what a run trains, with checks of what would go wrong later.

`load_pair` gives the policy pair of a recipe, `load_scorer` a reward or preference model to train,
and `merge` folds a trained adapter into its base model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from alignkit import files
from alignkit.batches import Plan
from alignkit.config.model import ModelConfig, ReferenceConfig, TargetConfig
from alignkit.errors import ConfigError, ModelError, first_line
from alignkit.policies.adapters import CONFIG, add_adapter, base_of, with_adapter
from alignkit.policies.export import dtype_to_save, save_in_dtype
from alignkit.policies.live import DTYPES, adopt, config_without_dropout
from alignkit.policies.module import PolicyModule, causal_lm
from alignkit.policies.pair import PolicyPair
from alignkit.policies.probe import check_head, choose_layout, probe_bundle
from alignkit.policies.reference import KINDS, Anchor, following_anchors, frozen, resolve_kind
from alignkit.policies.router import router_of
from alignkit.policies.scorer import TrainedScorer
from alignkit.policies.weights import check_files


def _check_source(name: str, field: str = "model.name_or_path") -> None:
    """ModelError for a path that holds no model; names on the hub are left to the hub."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"{field}: {name} is a file; give the folder that holds config.json, or a hub name"
        )

    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise ModelError(
                f"{field}: the folder {name} holds no config.json; give a folder written by "
                "save_pretrained"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{field}: there is no folder {name}; check the path, or give a hub name such as "
            "Qwen/Qwen3-0.6B"
        )


def load_tokenizer(model: ModelConfig, field: str = "model.name_or_path") -> Any:
    """The model's tokenizer, with a pad token. `field` of the recipe names the model in errors.

    A tokenizer without one pads with its unknown or end token. That is harmless here, because masks
    come from lengths and never from ids. Raises ModelError.
    """
    _check_source(model.name_or_path, field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # tokenizers raise a bare Exception for a damaged file
        raise ModelError(
            f"{field}: no tokenizer could be loaded from {model.name_or_path}: {first_line(error)}"
        ) from error
    return padded(tokenizer, model.name_or_path, field)


def padded(tokenizer: Any, name: str, field: str = "model.name_or_path") -> Any:
    """The tokenizer, which is given a pad token where it has none. ModelError where it cannot be."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"{field}: the tokenizer of {name} has no pad, unknown or end "
            "token; add one (tokenizer.add_special_tokens({'pad_token': '<pad>'})) and save it "
            "beside the model"
        )
    return tokenizer


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
    _check_source(model.name_or_path, field)
    if Path(model.name_or_path).is_dir():
        check_files(Path(model.name_or_path), field)
    # A bar per load would disturb the run's own display.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kernel = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    weights = DTYPES[dtype if model.dtype == "auto" else model.dtype]
    shared: dict[str, Any] = {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(model.name_or_path, **shared)
        if getattr(config, "alignkit_outputs", None) and not outputs:
            raise ModelError(
                "it is a reward or preference model, which writes nothing; name it under `rewards` "
                "or `judge`"
            )

        rates = config_without_dropout(config)

        auto: Any = AutoModelForSequenceClassification if outputs else AutoModelForCausalLM
        if outputs:
            config.num_labels = outputs
        loaded = auto.from_pretrained(
            model.name_or_path, config=config, dtype=weights, **kernel, **shared
        )
    except Exception as error:  # loaders raise anything, from OSError to SafetensorError
        raise ModelError(
            f"{field}: {model.name_or_path} could not be loaded: {first_line(error)}"
        ) from error

    if not outputs and loaded.get_output_embeddings() is None:
        raise ModelError(
            f"{field}: {model.name_or_path} has no language-model head; give a causal "
            "language model"
        )
    return loaded.to(device).eval(), rates


def load_frozen(
    model: ModelConfig, field: str, *, device: torch.device | str, dtype: str = "float32"
) -> tuple[Any, Any]:
    """A causal LM that is not trained, from a model or adapter folder or the hub, and its
    tokenizer. `field` of the recipe names it in errors. Raises ModelError.

    An adapter names the model that it belongs on; its folder may hold a tokenizer of its own.
    """
    folder = Path(model.name_or_path).expanduser()
    if not (folder / CONFIG).is_file():
        loaded, _ = load_model(model, device=device, dtype=dtype, field=field)
        return loaded, load_tokenizer(model, field)

    base = base_of(folder, model, field)
    loaded, _ = load_model(base, device=device, dtype=dtype, field=field)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(model if has_tokenizer else base, field)
    return with_adapter(loaded, folder, field).eval(), tokenizer


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether two tokenizers give every token the same id."""
    return vocabulary_hash(first) == vocabulary_hash(second)


def vocabulary_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary, ids included."""
    return files.vocabulary_hash(tokenizer.get_vocab())


def check_vocabulary(
    model: Any, tokenizer: Any, name: str, field: str = "model.name_or_path"
) -> None:
    """ModelError unless every token of the tokenizer has a row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"{field}: the tokenizer of {name} makes token ids up to {largest}, its "
            f"model has {rows} embeddings; use the tokenizer the model was trained with, or "
            "enlarge the model (resize_token_embeddings) and save both"
        )


def _reference_model(
    path: str,
    policy: nn.Module,
    tokenizer: Any,
    model: ModelConfig,
    device: torch.device | str,
    dtype: str,
) -> PolicyModule:
    """The reference at a path; ModelError unless its tokens mean what the policy's mean."""
    source = model.model_copy(update={"name_or_path": path, "revision": None, "adapter": None})
    _check_source(path, "reference.kind")
    loaded, other = load_frozen(source, "reference.kind", device=device, dtype=dtype)
    if not same_vocabulary(other, tokenizer):
        raise ModelError(
            f"reference.kind: the tokenizer of {path} ({len(other)} tokens) is not the policy's "
            f"({len(tokenizer)} tokens): log-probs of different tokens cannot be compared; choose "
            "a reference from the same family"
        )

    own, theirs = (causal_lm(m).config.get_text_config().vocab_size for m in (policy, loaded))
    if own != theirs:
        raise ModelError(
            f"reference.kind: {path} has a vocabulary of {theirs}, the policy one of {own}; they "
            "must be the same"
        )
    return frozen(PolicyModule(loaded))


def _load_or_adopt(
    model: ModelConfig, live: tuple[Any, Any] | None, device: torch.device | str, dtype: str
) -> tuple[Any, Any, Any, dict[str, float]]:
    """Tokenizer, model, the model with its adapter (None where it has none) and dropout rates."""
    if model.attention == "flex_attention" and torch.device(device).type == "cpu":
        raise ConfigError(
            "model.attention: flex_attention cannot train on a CPU (torch has no backward for it "
            "there); use sdpa"
        )

    if live is None:
        tokenizer = load_tokenizer(model)
        loaded, dropout = load_model(model, device=device, dtype=dtype)
        return tokenizer, loaded, None, dropout

    tokenizer = padded(deepcopy(live[1]), model.name_or_path)
    return tokenizer, *adopt(live[0], model, device=device, dtype=dtype)


def _start(
    model: ModelConfig,
    live: tuple[Any, Any] | None,
    device: torch.device | str,
    dtype: str,
    seed: int,
) -> tuple[Any, Any, Any, dict[str, float]]:
    """Tokenizer, causal LM, the same with its adapter if it has one, and its dropout rates."""
    # A live model may have an adapter already.
    tokenizer, loaded, adapted, dropout = _load_or_adopt(model, live, device, dtype)
    check_vocabulary(loaded, tokenizer, model.name_or_path)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    policy = adapted if adapted is not None else loaded
    if model.adapter is not None:
        policy = add_adapter(loaded, model.adapter, seed=seed)
    return tokenizer, loaded, policy, dropout


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
) -> PolicyPair:
    """The policy with its reference and target, ready to train.

    `dtype` is the weights' dtype where `model.dtype` is auto. `fixed_data`: the completions are
    known before training, so the reference can be scored once. `live` is a model (perhaps peft's)
    with its tokenizer, used in place of what `model` names and trained in place. `router_aux_loss`
    is the weight of the routers' loss, for mixtures of experts. `temperature` divides the logits of
    policy and anchors. Raises ModelError (exit 4) or ConfigError (exit 2).
    """
    tokenizer, loaded, policy, dropout = _start(model, live, device, dtype, seed)
    base = PolicyModule(policy, values=plan.values, bins=plan.bins).eval()

    # Compute a few log-probs both ways, before any time is spent on training.
    text = loaded.config.get_text_config()
    window = max((w for w in base.windows.values() if w), default=None)
    bundle = probe_bundle(text.vocab_size, window, getattr(text, "max_position_embeddings", None))
    check_head(base, bundle)
    layout, about_layout = choose_layout(base, model.layout, bundle)
    base.router, about_router = router_of(loaded, router_aux_loss)
    notes = [note for note in (about_layout, about_router) if note]
    if temperature != 1:
        base.temperature = temperature  # before anchors are copied from it
        notes.append(
            f"the policy is trained and its KL measured at temperature {temperature:g}; sample from "
            "the model at this temperature"
        )

    anchors = {}
    kind = resolve_kind(reference.kind, plan, adapter=policy is not loaded, fixed_data=fixed_data)
    if kind in KINDS:
        anchors["reference"] = Anchor.of(kind, base, reference)
    elif kind != "none":
        other = _reference_model(kind, loaded, tokenizer, model, device, dtype)
        other.temperature = temperature
        anchors["reference"] = Anchor("frozen", other)

    anchors |= following_anchors(target or TargetConfig(), plan, base)
    return PolicyPair(
        base,
        tokenizer,
        anchors,
        layout=layout,
        notes=notes,
        save_config=dropout,
        save_dtype=dtype_to_save(model, of=None if live is None else live[0]),
    )


def load_scorer(
    model: ModelConfig,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> TrainedScorer:
    """A model of `plan.outputs` numbers per text, ready to train: a language model's backbone and a
    fresh head, initialised from `seed`.

    What the numbers mean is written into the config that is saved. Raises ModelError, and
    ConfigError for LoRA.
    """
    if model.adapter is not None:
        raise ConfigError(
            "model.adapter: reward and preference models are trained whole; leave the adapter out"
        )
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)
    with _without_warnings():
        loaded, dropout = load_model(model, device=device, dtype=dtype, outputs=plan.outputs)
    check_vocabulary(loaded, tokenizer, model.name_or_path)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # The classifier finds the last token of a text by the pad token.
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if plan.joined:
        loaded.config.alignkit_outputs = "joined"
    else:
        loaded.config.alignkit_outputs = "reward" if plan.outputs == 1 else "embedding"
    return TrainedScorer(loaded, tokenizer, save_config=dropout, save_dtype=dtype_to_save(model))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' warning that a head is new and another unused, which is intended."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def merge(folder: Path | str, out: Path | str, *, dtype: str = "auto") -> None:
    """Fold the adapter of a run (or of an adapter folder) into its base model and write a plain
    model with its tokenizer, in `dtype` (auto: that of the base model's files).

    The folder `out` appears whole or not at all. Raises ModelError when there is no adapter, or its
    base model cannot be loaded, CheckpointError when that is not the one it was trained on, and
    ResourceError where the disk refuses.
    """
    source = Path(folder)
    if (source / "model" / CONFIG).exists():
        source = source / "model"
    if not (source / CONFIG).exists():
        raise ModelError(
            f"{folder} holds no adapter (adapter_config.json); only LoRA runs need merging"
        )

    base = base_of(source, ModelConfig.model_validate({"save_dtype": dtype}), "merge")
    model, _ = load_model(base, device="cpu")
    adapted = with_adapter(model, source, "merge")
    if not hasattr(adapted, "merge_and_unload"):
        raise ModelError(f"the adapter in {source} is of a kind that cannot be folded into a model")
    merged = adapted.merge_and_unload()

    # The run's own tokenizer if it has one, else the base model's, as it was before `load_tokenizer`
    # gave it a pad token.
    loaded = load_tokenizer(base)
    own = (source / "tokenizer_config.json").exists()
    tokenizer = loaded.from_pretrained(source if own else base.name_or_path)

    with files.writing(Path(out)), files.replaced_folder(Path(out)) as temporary:
        save_in_dtype(merged, temporary, merged.state_dict(), dtype_to_save(base))
        tokenizer.save_pretrained(temporary)
        files.write_manifest(temporary, {}, without=["README.md"])
