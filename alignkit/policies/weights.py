"""Which weights a model has: a hash of its files, by which a run knows that it was not replaced.

Two models at the same path, of the same shape and with the same tokenizer, differ in nothing else
that a run could see.
"""

import json
from pathlib import Path

from alignkit.errors import CheckpointError, ModelError
from alignkit.files import (
    MANIFEST,
    check_manifest,
    read_manifest,
    sha256_of_files,
    sha256_of_json,
)

# File names without their ending, in the order in which loaders look for them.
STEMS = ("adapter_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".bin")


def model_folder(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a model: the one that is named, or the snapshot of a hub name, which must
    have been loaded before. ModelError where there is none.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder

    from transformers.utils import cached_file

    for file in ("config.json", "adapter_config.json"):
        try:
            config = cached_file(name_or_path, file, revision=revision, local_files_only=True)
        except OSError:
            continue
        if config:
            return Path(config).parent
    raise ModelError(f"{name_or_path}: there is no local copy of the model to look at")


def weights_hash(name_or_path: str, revision: str | None = None) -> str:
    """SHA-256 over a model's weights, its config and the code that comes with it, in hex. The bytes
    of the files count; their times and the place of the folder do not.
    """
    folder = model_folder(name_or_path, revision)
    names = ("config.json", "generation_config.json", "adapter_config.json")
    configs = [folder / name for name in names]
    code = sorted(path for path in folder.glob("*.py") if not path.name.startswith("."))
    chosen = [path for path in configs if path.is_file()] + code + weight_files(folder)

    hashes = dict(zip((path.name for path in chosen), sha256_of_files(chosen)))
    base = _local_base(folder)
    if base is not None:
        hashes["base"] = weights_hash(base)
    return sha256_of_json(hashes)


def _local_base(adapter: Path) -> str | None:
    """The folder of the model that an adapter belongs on, if it names one that is there."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        name = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_other = isinstance(name, str) and Path(name).expanduser().resolve() != adapter.resolve()
    return name if is_other and Path(name).expanduser().is_dir() else None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, shards in order; those of other formats beside them
    are not read when the model is loaded.
    """
    for ending in ENDINGS:
        for stem in STEMS:
            index = folder / f"{stem}{ending}.index.json"
            if index.is_file():
                return _shards(index)
            whole = folder / f"{stem}{ending}"
            if whole.is_file():
                return [whole]

    # Names of their own, such as those of a variant.
    for ending in ENDINGS:
        files = sorted(p for p in folder.glob(f"*{ending}") if not p.name.startswith("."))
        if files:
            return files
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({type(error).__name__})") from error
    return [index.parent / name for name in sorted(names)]


def check_files(folder: Path, field: str = "") -> None:
    """ModelError for a model that alignkit wrote and whose files no longer match its manifest. A
    folder without a manifest, older or from elsewhere, is accepted.
    """
    manifest = read_manifest(folder)
    is_foreign = bool(manifest) and not {"files", "sha256"} <= manifest.keys()
    if is_foreign or not (folder / MANIFEST).exists():
        return
    reason = check_manifest(folder)
    if reason:
        prefix = f"{field}: " if field else ""
        raise ModelError(
            f"{prefix}the model in {folder} is damaged: {reason}. Take a copy that is whole; if you "
            f"changed the file yourself, delete {MANIFEST}"
        )


def check_base(adapter: Path, base: str, revision: str | None = None) -> None:
    """CheckpointError where `base` is not the model, bit for bit, that the adapter was trained on.
    An adapter that does not say so, older or from elsewhere, is accepted.
    """
    identity = read_manifest(adapter).get("identity", {})
    expected = identity.get("weights", {}).get("model")
    if expected is not None and weights_hash(base, revision) != expected:
        raise CheckpointError(
            f"the base model {base} is not the one that {adapter} was trained on: its weights have "
            "been replaced. Put the former model back, or train again on this one"
        )
