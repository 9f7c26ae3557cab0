"""Loading models and tokenizers, and checking at the start what would train wrongly later."""

from pathlib import Path

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
from alignkit.batches import Bundle, Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig, TargetConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.layout import Layout, build_rows
from alignkit.policies.module import PolicyModule, causal_lm
from alignkit.policies.pair import PolicyPair
from alignkit.policies.reference import KINDS, START_ADAPTER, Anchor, frozen, resolve_kind
from alignkit.policies.scorer import TrainedScorer

AGREE = 1e-4  # largest difference of log-probs between the two layouts, float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_source(name: str, field: str = "model.name_or_path") -> None:
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"{field}: {name} is a file; give the folder that holds config.json, or a hub name"
        )
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise ModelError(
                f"{field}: the folder {name} holds no config.json; give a folder written by save_pretrained"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{field}: there is no folder {name}; check the path, or give a hub name such as Qwen/Qwen3-0.6B"
        )


def load_tokenizer(model: ModelConfig):
    """The model's tokenizer, with a pad token. A tokenizer without one pads with its unknown or end
    token: harmless here, because masks come from lengths and never from ids. Raises ModelError.
    """
    _check_source(model.name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # tokenizers raise a bare Exception for a damaged file
        raise ModelError(
            f"model.name_or_path: no tokenizer could be loaded from {model.name_or_path}: {_first_line(error)}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"model.name_or_path: the tokenizer of {model.name_or_path} has no pad, unknown or end token; add one "
            "(tokenizer.add_special_tokens({'pad_token': '<pad>'})) and save it beside the model"
        )
    return tokenizer


def load_model(
    model: ModelConfig, *, device: torch.device | str, dtype: str = "float32", outputs: int = 0
) -> tuple[nn.Module, dict[str, float]]:
    """A causal LM without dropout, in evaluation mode, and the dropout rates its config had. With
    `outputs` its backbone under a fresh head of so many numbers per text, as a sequence classifier.
    """
    _check_source(model.name_or_path)
    transformers_logging.disable_progress_bar()  # a bar per load would tear the run's own display
    kernel = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    weights = DTYPES[dtype if model.dtype == "auto" else model.dtype]
    shared = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model.name_or_path, **shared)
        if getattr(config, "alignkit_outputs", None) and not outputs:
            raise ModelError(
                "it is a reward or preference model, which writes nothing; name it under `rewards` or `judge`"
            )
        rates = {
            k: v
            for k, v in config.to_dict().items()
            if k.endswith(("dropout", "_pdrop")) and isinstance(v, float) and v > 0
        }
        for name in rates:
            setattr(config, name, 0.0)
        auto = AutoModelForSequenceClassification if outputs else AutoModelForCausalLM
        if outputs:
            config.num_labels = outputs
        loaded = auto.from_pretrained(
            model.name_or_path, config=config, dtype=weights, **kernel, **shared
        )
    except Exception as error:  # loaders raise anything, from OSError to SafetensorError
        raise ModelError(
            f"model.name_or_path: {model.name_or_path} could not be loaded: {_first_line(error)}"
        ) from error
    if not outputs and loaded.get_output_embeddings() is None:
        raise ModelError(
            f"model.name_or_path: {model.name_or_path} has no language-model head; give a causal language model"
        )
    return loaded.to(device).eval(), rates


def same_vocabulary(first, second) -> bool:
    """Whether two tokenizers give every token the same id."""
    return vocabulary_hash(first) == vocabulary_hash(second)


def vocabulary_hash(tokenizer) -> str:
    """Hash of a tokenizer's vocabulary, ids included."""
    return files.vocabulary_hash(tokenizer.get_vocab())


def check_vocabulary(model: nn.Module, tokenizer, name: str) -> None:
    """Every token the tokenizer can make has a row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"model.name_or_path: the tokenizer of {name} makes token ids up to {largest}, its model has {rows} embeddings; use "
            "the tokenizer the model was trained with, or enlarge the model (resize_token_embeddings) and save both"
        )


def _reference_model(
    path: str, policy: nn.Module, tokenizer, model: ModelConfig, device, dtype: str
) -> PolicyModule:
    """The reference at a path, refused unless its tokens mean what the policy's mean."""
    source = model.model_copy(update={"name_or_path": path, "revision": None, "adapter": None})
    _check_source(path, "reference.kind")
    other = load_tokenizer(source)
    if not same_vocabulary(other, tokenizer):
        raise ModelError(
            f"reference.kind: the tokenizer of {path} ({len(other)} tokens) is not the policy's ({len(tokenizer)} tokens): "
            "log-probs of different tokens cannot be compared; choose a reference from the same family"
        )
    loaded, _ = load_model(source, device=device, dtype=dtype)
    own, theirs = (causal_lm(m).config.get_text_config().vocab_size for m in (policy, loaded))
    if own != theirs:
        raise ModelError(
            f"reference.kind: {path} has a vocabulary of {theirs}, the policy one of {own}; they must be the same"
        )
    return frozen(PolicyModule(loaded))


def add_adapter(model: nn.Module, adapter: AdapterConfig, *, seed: int) -> nn.Module:
    """The model with a LoRA adapter: a new one, or one to train on, whose frozen twin stays as the
    reference.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if adapter.path is None:
            targets = adapter.target_modules
            settings = LoraConfig(
                r=adapter.r,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            )
            try:
                return get_peft_model(model, settings)
            except ValueError as error:
                raise ModelError(f"model.adapter.target_modules: {_first_line(error)}") from error
        if not (Path(adapter.path) / "adapter_config.json").exists():
            raise ModelError(
                f"model.adapter.path: there is no adapter_config.json in {adapter.path}; give a folder written by peft"
            )
        loaded = PeftModel.from_pretrained(model, adapter.path, is_trainable=True)
        loaded.load_adapter(adapter.path, START_ADAPTER, is_trainable=False)
        return loaded


def probe_bundle(vocab: int, window: int | None, limit: int | None) -> Bundle:
    """A bundle that shows whether a model can branch: three completions, longer than the sliding
    window where there is one.
    """
    length = (window or 0) + 8
    if limit is not None:
        length = min(length, limit - 8)
    rng = torch.Generator().manual_seed(0)
    prompt, *completions = (
        torch.randint(vocab, (n,), generator=rng) for n in (max(1, length), 5, 1, 4)
    )
    return Bundle(prompt, completions, [torch.ones(len(c), dtype=torch.bool) for c in completions])


@torch.no_grad()
def check_head(module: PolicyModule, bundle: Bundle) -> None:
    """Our head on one row against the model's own logits."""
    rows = build_rows([bundle], "padded", next(module.parameters()).device)
    lm = causal_lm(module.model)
    logits = lm(input_ids=rows.input_ids, attention_mask=torch.ones_like(rows.input_ids)).logits
    expected = (
        logits.flatten(0, 1)[rows.sources]
        .float()
        .log_softmax(-1)
        .gather(-1, rows.labels[:, None])[:, 0]
    )
    difference = float((module(rows)["policy"].float() - expected).abs().max())
    # half-precision logits are rounded in another order
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.25
    if not difference <= tolerance:
        raise ModelError(
            f"the head of {type(lm).__name__} gives log-probs that differ from the model's own by {difference:.1e}: it does "
            "something after its head module that alignkit does not know; please report the model's name"
        )


@torch.no_grad()
def choose_layout(module: PolicyModule, wanted: str, bundle: Bundle) -> tuple[Layout, str]:
    """Shared-prefix rows where the model gives the same log-probs for them, else padded rows; and
    why, for the notes.
    """
    if wanted == "padded":
        return "padded", ""
    device = next(module.parameters()).device
    figures = {}
    try:
        for layout in ("padded", "shared_prefix"):
            rows = build_rows([bundle], layout, device, packing=module.packing)
            figures[layout] = rows.scatter(module(rows)["policy"].float())
        difference = float((figures["padded"] - figures["shared_prefix"]).abs().max())
        half = next(module.parameters()).dtype != torch.float32
        why = (
            ""
            if difference <= (0.25 if half else AGREE)
            else f"its log-probs differ by {difference:.1e} from separate rows"
        )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        NotImplementedError,
        IndexError,
    ) as error:
        why = f"it refuses the mask ({_first_line(error)})"
    if not why:
        return "shared_prefix", ""
    message = f"this model cannot branch completions off one prompt: {why}"
    if wanted == "shared_prefix":
        raise ModelError(f"model.layout: {message}; use model.layout=auto or padded")
    return "padded", f"padded rows: {message}"


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
) -> PolicyPair:
    """The policy with its reference and target, ready to train.

    `dtype` is the weights' dtype where `model.dtype` is auto. `fixed_data`: the completions are
    known before training, so the reference can be scored once. Raises ModelError (exit 4) or
    ConfigError (exit 2).
    """
    if model.attention == "flex_attention" and torch.device(device).type == "cpu":
        raise ConfigError(
            "model.attention: flex_attention cannot train on a CPU (torch has no backward for it there); use sdpa"
        )
    tokenizer = load_tokenizer(model)
    loaded, dropout = load_model(model, device=device, dtype=dtype)
    check_vocabulary(loaded, tokenizer, model.name_or_path)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = loaded if model.adapter is None else add_adapter(loaded, model.adapter, seed=seed)
    base = PolicyModule(policy, values=plan.values).eval()
    windows = [w for w in base.windows.values() if w]
    text = loaded.config.get_text_config()
    bundle = probe_bundle(
        text.vocab_size, max(windows, default=None), getattr(text, "max_position_embeddings", None)
    )
    check_head(base, bundle)
    layout, note = choose_layout(base, model.layout, bundle)
    anchors = {}
    kind = resolve_kind(
        reference.kind, plan, adapter=model.adapter is not None, fixed_data=fixed_data
    )
    if kind != "none":
        if kind in KINDS:
            anchors["reference"] = Anchor.of(kind, base, reference)
        else:
            anchors["reference"] = Anchor(
                "frozen", _reference_model(kind, loaded, tokenizer, model, device, dtype)
            )
    followed = target or TargetConfig()
    if "previous" in plan.anchors:  # first: it takes over from the target before the target moves
        synced = Anchor.of(followed.kind, base, followed)
        anchors |= {"previous": Anchor.before(synced, base), "target": synced}
    elif "target" in plan.anchors:
        anchors["target"] = Anchor.of(followed.kind, base, followed)
    return PolicyPair(
        base, tokenizer, anchors, layout=layout, notes=[note] if note else [], save_config=dropout
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
    fresh head.

    What the numbers mean is written into the config that is saved. Raises ModelError, and
    ConfigError for LoRA.
    """
    if model.adapter is not None:
        raise ConfigError(
            "model.adapter: reward and preference models are trained whole; leave the adapter out"
        )
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)  # of the fresh head
    told = transformers_logging.get_verbosity()
    # that the head is new and the language model's is unused, as it should be
    transformers_logging.set_verbosity_error()
    try:
        loaded, dropout = load_model(model, device=device, dtype=dtype, outputs=plan.outputs)
    finally:
        transformers_logging.set_verbosity(told)
    check_vocabulary(loaded, tokenizer, model.name_or_path)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loaded.config.get_text_config().pad_token_id = loaded.config.pad_token_id = (
        tokenizer.pad_token_id
    )
    loaded.config.alignkit_outputs = (
        "joined" if plan.joined else "reward" if plan.outputs == 1 else "embedding"
    )
    return TrainedScorer(loaded, tokenizer, save_config=dropout)


def merge(folder: Path | str, out: Path | str) -> None:
    """Fold the adapter of a run (or of an adapter folder) into its base model and write a plain
    model with its tokenizer.

    Raises ModelError when there is no adapter, or its base model cannot be loaded.
    """
    from peft import PeftConfig, PeftModel

    source = Path(folder)
    source = source / "model" if (source / "model" / "adapter_config.json").exists() else source
    if not (source / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds no adapter (adapter_config.json); only LoRA runs need merging"
        )
    base = PeftConfig.from_pretrained(source).base_model_name_or_path
    model, _ = load_model(ModelConfig(name_or_path=base or ""), device="cpu")
    PeftModel.from_pretrained(model, source).merge_and_unload().save_pretrained(out)
    tokenizer = source if (source / "tokenizer_config.json").exists() else Path(base)
    load_tokenizer(ModelConfig(name_or_path=str(base))).from_pretrained(tokenizer).save_pretrained(
        out
    )
