"""Reference log-probs on disk, so that several runs score each row only once between them.

A file belongs to one set of weights, dtype, attention kernel and autocast. A row in it is found by
its token ids and masks, so neither the order of the rows nor the layout matters, and runs on parts
of the same data share the rows they have in common.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.errors import CheckpointError, ResourceError, first_line
from alignkit.files import locked, replaced_file, sha256_of_parts, writing
from alignkit.policies.dtensors import full
from alignkit.policies.lazy import Selected, changed
from alignkit.policies.module import causal_lm
from alignkit.policies.pair import PolicyPair

# Largest difference between stored and live log-probs; rows of another length round differently.
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.25

# What a file holds: of all rows, one behind the other.
EMPTY = {
    "keys": torch.zeros((0, 16), dtype=torch.uint8),
    "completions": torch.zeros(0, dtype=torch.int64),  # of each row
    "lengths": torch.zeros(0, dtype=torch.int64),  # of each completion, in tokens
    "logps": torch.zeros(0),
}


class _Rows:
    """The rows of a store: for each key the log-probs of its completions, K x [T_k]."""

    def __init__(self, content: Mapping[str, Tensor]) -> None:
        self.content = content
        self.ends = [0, *content["lengths"].cumsum(0).tolist()]  # of the completions
        counts = content["completions"].tolist()
        firsts = [0, *accumulate(counts)]
        keys = (key.tobytes() for key in content["keys"].numpy())
        self.completions = dict(zip(keys, map(range, firsts, firsts[1:])))

    def __contains__(self, key: bytes) -> bool:
        return key in self.completions

    def __getitem__(self, key: bytes) -> list[Tensor]:
        logps = self.content["logps"]
        return [logps[self.ends[i] : self.ends[i + 1]] for i in self.completions[key]]


def cached_in(
    folder: Path, pair: PolicyPair, bundles: Sequence[Bundle], plan: Plan
) -> Sequence[Bundle]:
    """Like `pair.cached`, with a store: rows that `folder` has are read, the others are scored and
    added to it.

    Processes that ask at the same time wait for each other, so no row is scored twice. If every
    row was read, a few are scored live as well, and `pair.notes` says by how much they differ.
    Raises ResourceError where that is too much or the disk refuses, CheckpointError where a file is
    damaged.
    """
    file = folder / f"{weights_key(pair, 'policy')}.safetensors"
    keys = [row_key(bundle) for bundle in bundles]

    # Processes that share a model cannot wait for each other's lock while they score together.
    if pair.shards is not None:
        return _cached_together(file, pair, bundles, keys, plan)

    with store_lock(file):
        stored = _read(file)
        missing = {key: place for place, key in enumerate(keys) if key not in stored}
        if missing:
            scored = pair.cached(Selected(bundles, list(missing.values())), plan)
            stored = _with_more(stored, list(missing), scored)
            _write(file, stored.content)

    def with_reference(place: int, bundle: Bundle) -> Bundle:
        return replace(bundle, tokens={**bundle.tokens, "reference": stored[keys[place]]})

    filled = changed(bundles, with_reference)
    if not missing and filled:
        _check(pair, filled, file)
    return filled


@contextmanager
def store_lock(file: Path) -> Iterator[None]:
    """Make the folder of a store's file, and keep others out of the file meanwhile. ResourceError
    where the disk refuses.
    """
    with ExitStack() as stack:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(file.with_suffix(".lock")))
        yield


def _cached_together(
    file: Path, pair: PolicyPair, bundles: Sequence[Bundle], keys: Sequence[bytes], plan: Plan
) -> Sequence[Bundle]:
    """`cached_in` for a sharded pair: every process scores what it misses, and adds it after that."""
    stored = _read(file)
    missing = {key: place for place, key in enumerate(keys) if key not in stored}
    scored = pair.cached(Selected(bundles, list(missing.values())), plan)
    stored = _with_more(stored, list(missing), scored)
    if missing:
        with store_lock(file):
            _write(file, _with_more(_read(file), list(missing), scored).content)

    def with_reference(place: int, bundle: Bundle) -> Bundle:
        return replace(bundle, tokens={**bundle.tokens, "reference": stored[keys[place]]})

    filled = changed(bundles, with_reference)
    with pair.together():
        if not missing and filled:
            _check(pair, filled, file)
    return filled


def _check(pair: PolicyPair, bundles: Sequence[Bundle], file: Path) -> None:
    """Score a few bundles live; ResourceError where they differ too much from what was read."""
    worst = pair.rescored(bundles)
    exact = pair.parameters()[0].dtype == torch.float32
    if not worst <= (TOLERANCE if exact else HALF_TOLERANCE):
        raise ResourceError(
            f"reference.store: {file} differs from live log-probs by {worst:.1e}; it is damaged, "
            "delete it"
        )
    pair.notes.append(
        f"reference log-probs of {len(bundles)} bundles read from {file}; those scored again "
        f"differ by at most {worst:.1e}"
    )


def weights_key(pair: PolicyPair, name: str) -> str:
    """What a file belongs to: weights, dtypes, attention kernel and autocast, as 24 hex digits."""

    def parts(model: torch.nn.Module) -> Iterator[bytes]:
        kernel = causal_lm(model).config._attn_implementation
        yield f"{kernel} {torch.is_autocast_enabled(pair.device.type)}".encode()
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            flat = full(tensor.detach()).cpu().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().tobytes()

    with pair.model(name) as model:
        return sha256_of_parts(parts(model))[:24]


def row_key(bundle: Bundle) -> bytes:
    """What a row is found by: 16 bytes of the hash of its token ids and masks."""
    parts = [bundle.prompt.numpy().tobytes()]
    for ids, mask in zip(bundle.completions, bundle.masks):
        parts += [b"|", ids.numpy().tobytes(), b"/", mask.numpy().tobytes()]
    return bytes.fromhex(sha256_of_parts(parts))[:16]


def damage(file: Path) -> str | None:
    """What is wrong with a file of a store; None for one that is whole, or of a version that saved
    no hash with it.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            expected = (stored.metadata() or {}).get("sha256")
        if expected is not None and _content_hash(load_file(file)) != expected:
            return "it does not match its SHA-256"
    except SafetensorError as error:
        return first_line(error)
    return None


def _content_hash(content: Mapping[str, Tensor]) -> str:
    return sha256_of_parts(
        part
        for name in sorted(content)
        for part in (name.encode(), content[name].contiguous().numpy().tobytes())
    )


def _read(file: Path) -> _Rows:
    if not file.exists():
        return _Rows(EMPTY)
    reason = damage(file)
    if reason:
        raise CheckpointError(f"reference.store: {file} is damaged: {reason}; delete it")
    return _Rows(load_file(file))


def _with_more(stored: _Rows, keys: Sequence[bytes], scored: Sequence[Bundle]) -> _Rows:
    """The rows with those of `scored` bundles behind them, as far as they are new."""
    # Numbers in arrays that grow: there may be more rows than objects of their own fit in memory.
    new_keys = bytearray()
    counts = array("q")
    lengths = array("q")
    logps = array("f")
    for key, bundle in zip(keys, scored):
        if key in stored:
            continue
        new_keys += key
        counts.append(len(bundle.completions))
        for values in bundle.tokens["reference"]:
            lengths.append(len(values))
            logps.frombytes(values.numpy().tobytes())
    if not new_keys:
        return stored

    more = {
        "keys": np.frombuffer(new_keys, np.uint8).reshape(-1, 16),
        "completions": np.frombuffer(counts, np.int64),
        "lengths": np.frombuffer(lengths, np.int64),
        "logps": np.frombuffer(logps, np.float32),
    }
    return _Rows(
        {
            name: torch.cat([old, torch.from_numpy(more[name])])
            for name, old in stored.content.items()
        }
    )


def _write(file: Path, content: Mapping[str, Tensor]) -> None:
    with writing(file), replaced_file(file) as temporary:
        save_file(dict(content), temporary, metadata={"sha256": _content_hash(content)})
