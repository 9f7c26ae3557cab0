"""Whose laws a file of `teacher.store` holds, so that a run can look for the file of its teacher
without loading it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alignkit.config.teacher import TeacherConfig
from alignkit.errors import ModelError, ResourceError
from alignkit.files import sha256_of_json
from alignkit.policies.module import causal_lm
from alignkit.policies.pair import PolicyPair
from alignkit.policies.tokenizer import vocabulary_hash
from alignkit.policies.weights import model_folder, weight_files, weights_hash

SIGNATURE = "signature"  # in a file's metadata: a Signature as JSON
NAMES = "names"  # and the names under which its teacher was asked, [name, revision] each


@dataclass(frozen=True)
class Signature:
    """What the laws of a file depend on besides the tokens."""

    weights: str  # SHA-256 of the teacher's files
    dtype: str
    kernel: str
    autocast: bool
    tokenizer: str  # hash of the vocabulary
    size: int  # rows of the teacher's head
    vocabulary: int  # of these, how many the policy has too
    top: int

    @classmethod
    def of(cls, pair: PolicyPair, teacher: TeacherConfig) -> "Signature":
        """That of a teacher which is loaded."""
        module = pair.anchors["teacher"].module
        assert module is not None
        assert teacher.top is not None
        size: int = causal_lm(module.model).config.get_text_config().vocab_size
        return cls(
            weights=weights_hash(teacher.name_or_path, teacher.revision),
            size=size,
            vocabulary=module.vocabulary or size,
            top=teacher.top,
            **_of_run(pair, teacher),
        )

    @property
    def file_name(self) -> str:
        """The file's name within a store."""
        key = sha256_of_json(asdict(self))[:24]
        return f"teacher-{key}-{self.vocabulary}-top{self.top}.safetensors"

    def fits(self, pair: PolicyPair, teacher: TeacherConfig) -> bool:
        """Whether a run with this policy would get the same laws from a teacher of these weights."""
        own = asdict(self)
        same = all(own[name] == value for name, value in _of_run(pair, teacher).items())
        shared = min(self.size, pair.vocab_size) == self.vocabulary
        return same and shared and self.top == teacher.top


def _of_run(pair: PolicyPair, teacher: TeacherConfig) -> dict[str, Any]:
    """The part of a signature that is known without the teacher."""
    first = next(pair.base.parameters())
    own_dtype = str(first.dtype).removeprefix("torch.")
    return {
        "dtype": own_dtype if teacher.dtype == "auto" else teacher.dtype,
        "kernel": str(causal_lm(pair.base.model).config._attn_implementation),
        "autocast": torch.is_autocast_enabled(pair.device.type),
        "tokenizer": vocabulary_hash(pair.tokenizer),
    }


def stored_file(pair: PolicyPair, teacher: TeacherConfig) -> Path | None:
    """The file of `teacher.store` with laws of this teacher; None where there is none.

    A teacher whose weights are on this machine is known by their hash, any other one by its name.
    ResourceError where a file is damaged, or where two teachers had that name.
    """
    matches = _matches(pair, teacher)
    if len(matches) > 1:
        raise ResourceError(
            f"teacher.store: {' and '.join(map(str, matches))} hold laws of two teachers that were "
            f"both called {teacher.name_or_path}, which is not there now to compare; delete one"
        )
    return next(iter(matches), None)


def weights_of(pair: PolicyPair, teacher: TeacherConfig) -> str:
    """The hash of the teacher's weights: of its files, or as its file in the store remembers it.
    ModelError where there is neither.
    """
    files = _weights(teacher)
    if files is not None or not teacher.store:
        return files or weights_hash(teacher.name_or_path, teacher.revision)
    signatures = [signature.weights for signature in _matches(pair, teacher).values()]
    return signatures[0] if signatures else weights_hash(teacher.name_or_path, teacher.revision)


def _matches(pair: PolicyPair, teacher: TeacherConfig) -> dict[Path, Signature]:
    """The files of the store that may hold this teacher's laws."""
    if teacher.store is None:
        return {}
    weights = _weights(teacher)
    matches = {}
    for file in sorted(Path(teacher.store).expanduser().glob("teacher-*.safetensors")):
        signature, names = _read(file)
        if signature is None or not signature.fits(pair, teacher):
            continue
        called_so = any([name, teacher.revision] in names for name in _names(teacher))
        if signature.weights == weights or (weights is None and called_so):
            matches[file] = signature
    return matches


def _weights(teacher: TeacherConfig) -> str | None:
    """The hash of the teacher's weights; None where they are not on this machine."""
    try:
        if not weight_files(model_folder(teacher.name_or_path, teacher.revision)):
            return None
        return weights_hash(teacher.name_or_path, teacher.revision)
    except ModelError:
        return None


def _names(teacher: TeacherConfig) -> list[str]:
    """The name as it was given, and the folder that it may be."""
    return [teacher.name_or_path, str(Path(teacher.name_or_path).expanduser().resolve())]


def metadata(signature: Signature, teacher: TeacherConfig, file: Path) -> dict[str, str]:
    """What a file of the store says of itself. Names that it knows already are kept."""
    names = _read(file)[1] if file.exists() else []
    own = [[name, teacher.revision] for name in _names(teacher)]
    return {
        SIGNATURE: json.dumps(asdict(signature)),
        NAMES: json.dumps([*names, *(name for name in own if name not in names)]),
    }


def _read(file: Path) -> tuple[Signature | None, list[list[str | None]]]:
    """A file's signature and names; None for one of a version that did not write them.

    ResourceError where the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            written = stored.metadata() or {}
        if SIGNATURE not in written:
            return None, []
        return Signature(**json.loads(written[SIGNATURE])), json.loads(written[NAMES])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(file) from error


def shared_vocabulary(file: Path) -> int | None:
    """How many tokens the policy and the teacher of a file share; None where it does not say."""
    signature = _read(file)[0]
    return None if signature is None else signature.vocabulary


def damaged(file: Path) -> ResourceError:
    """The error for a file that is not what was written."""
    return ResourceError(f"teacher.store: {file} is damaged; delete it")
