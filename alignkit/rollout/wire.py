"""What the trainer and a sampling server must agree on. Standard library only: the server runs in
its engine's environment.
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

PROTOCOL = 1  # raise it when a message changes
# the environment variable that holds the password of both sides
TOKEN_ENV = "ALIGNKIT_ROLLOUT_TOKEN"
VERSION_HEADER = "X-Alignkit-Version"
CHUNK = 1 << 20  # bytes of weights that are in memory at a time
SHAPE = (  # of a model's config: what tells two architectures apart
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def shape_of(config: Any) -> dict[str, Any]:
    """The figures of a transformers config that `SHAPE` names; None where it has no such figure."""
    return {name: getattr(config, name, None) for name in SHAPE}


def chunks(file: Path) -> Iterator[bytes]:
    """The bytes of a file, a chunk at a time."""
    with file.open("rb") as source:
        while block := source.read(CHUNK):
            yield block


def version_of(file: Path) -> str:
    """The version of weights is their SHA-256: a name that cannot be wrong."""
    digest = sha256()
    for block in chunks(file):
        digest.update(block)
    return digest.hexdigest()
