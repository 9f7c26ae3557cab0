"""Folding a trained adapter into its base model."""

from pathlib import Path

from alignkit import files
from alignkit.config.adapter_kinds import ADAPTER_FILE
from alignkit.config.model import ModelConfig
from alignkit.errors import ModelError
from alignkit.policies.adapters import base_of, untie, with_adapter
from alignkit.policies.export import dtype_to_save, save_in_dtype
from alignkit.policies.load import load_model
from alignkit.policies.tokenizer import load_tokenizer


def merge(folder: Path | str, out: Path | str, *, dtype: str = "auto") -> None:
    """Fold the adapter of a run (or of an adapter folder) into its base model and write a plain
    model with its tokenizer, in `dtype` (auto: that of the base model's files).

    The folder `out` appears whole or not at all. Raises ModelError when there is no adapter, or its
    base model cannot be loaded, CheckpointError when that is not the one it was trained on, and
    ResourceError where the disk refuses.
    """
    source = Path(folder)
    if (source / "model" / ADAPTER_FILE).exists():
        source = source / "model"
    if not (source / ADAPTER_FILE).exists():
        raise ModelError(
            f"{folder} holds no adapter (adapter_config.json); only LoRA runs need merging"
        )

    base = base_of(source, ModelConfig.model_validate({"save_dtype": dtype}), "merge")
    model, _ = load_model(base, device="cpu")
    adapted = with_adapter(model, source, "merge")
    if not hasattr(adapted, "merge_and_unload"):
        raise ModelError(f"the adapter in {source} is of a kind that cannot be folded into a model")
    merged = adapted.merge_and_unload()
    untie(merged)

    # The run's own tokenizer if it has one, else the base model's, as it was before `load_tokenizer`
    # gave it a pad token.
    loaded = load_tokenizer(base)
    own = (source / "tokenizer_config.json").exists()
    tokenizer = loaded.from_pretrained(source if own else base.name_or_path)

    with files.writing(Path(out)), files.replaced_folder(Path(out)) as temporary:
        save_in_dtype(merged, temporary, merged.state_dict(), dtype_to_save(base))
        tokenizer.save_pretrained(temporary)
        files.write_manifest(temporary, {}, without=["README.md"])
