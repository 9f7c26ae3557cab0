"""One reference pass for several runs: log-probs kept in a file, row by row.

A file belongs to one set of weights, dtype, attention kernel and autocast; a row is found by its
token ids and masks, whatever the order of the rows and the layout. So runs on the same data, or on
parts of it, score each row once between them.
"""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.errors import ResourceError
from alignkit.policies.module import causal_lm
from alignkit.policies.pair import PolicyPair

# between stored and live log-probs; rows of another length round differently
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.25
Known = dict[bytes, list[Tensor]]  # row -> log-probs of its completions, K x [T_k]


def cached_in(
    folder: Path, pair: PolicyPair, bundles: Sequence[Bundle], plan: Plan
) -> list[Bundle]:
    """As `pair.cached`, with a store: rows that `folder` knows are read, the others are scored and
    added to it.

    Processes that ask at the same time wait for each other, so no row is scored twice. Of what was
    read, a few rows are scored live; `pair.notes` says how far that is from the store.
    ResourceError where it is too far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_weights_key(pair)}.safetensors"
    keys = [_row_key(bundle) for bundle in bundles]
    with _locked(file.with_suffix(".lock")):
        known = _read(file)
        missing = {key: bundle for key, bundle in zip(keys, bundles) if key not in known}
        if missing:
            scored = pair.cached(list(missing.values()), plan)
            known |= {key: list(bundle.tokens["reference"]) for key, bundle in zip(missing, scored)}
            _write(file, known)
    found = [
        replace(bundle, tokens={**bundle.tokens, "reference": known[key]})
        for key, bundle in zip(keys, bundles)
    ]
    if not missing and found:
        worst = pair.rescored(found)
        if not worst <= (
            TOLERANCE if pair.parameters()[0].dtype == torch.float32 else HALF_TOLERANCE
        ):
            raise ResourceError(
                f"reference.store: {file} differs from live log-probs by {worst:.1e}; it is damaged, delete it"
            )
        pair.notes.append(
            f"reference log-probs of {len(found)} bundles read from {file}; those scored again differ by at most {worst:.1e}"
        )
    return found


def _weights_key(pair: PolicyPair) -> str:
    with pair.model("policy") as model:
        config = causal_lm(model).config
        digest = sha256(
            f"{config._attn_implementation} {torch.is_autocast_enabled(pair.device.type)}".encode()
        )
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:24]


def _row_key(bundle: Bundle) -> bytes:
    digest = sha256(bundle.prompt.numpy().tobytes())
    for ids, mask in zip(bundle.completions, bundle.masks):
        digest.update(b"|" + ids.numpy().tobytes() + b"/" + mask.numpy().tobytes())
    return digest.digest()[:16]


def _read(file: Path) -> Known:
    if not file.exists():
        return {}
    found = load_file(file)
    rows = iter(found["logps"].split(found["lengths"].tolist()))
    keys = found["keys"].numpy()
    return {
        key.tobytes(): [next(rows) for _ in range(k)]
        for key, k in zip(keys, found["completions"].tolist())
    }


def _write(file: Path, known: Mapping[bytes, Sequence[Tensor]]) -> None:
    rows = [row for completions in known.values() for row in completions]
    beside = file.with_suffix(".tmp")
    save_file(
        {
            "keys": torch.tensor([list(key) for key in known], dtype=torch.uint8),
            "completions": torch.tensor([len(completions) for completions in known.values()]),
            "lengths": torch.tensor([len(row) for row in rows]),
            "logps": torch.cat(rows),
        },
        beside,
    )
    beside.replace(file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """The operating system's lock: a process that dies gives it back."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
