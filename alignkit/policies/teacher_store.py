"""The teacher's most likely tokens, scored once before training, and kept on disk for later runs.

A file belongs to one teacher (weights, dtype, kernel), one length of vocabulary and one `top`; a row
in it is found by its token ids and masks. The file says whose it is, so that a run which finds all
its rows never loads the teacher.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.batches import Bundle
from alignkit.config.model import ModelConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.errors import ModelError
from alignkit.files import replaced_file, sha256_of_parts, writing
from alignkit.policies.head import chunk_rows
from alignkit.policies.layout import Rows, build_rows
from alignkit.policies.pair import SCORING_BUDGET, PolicyPair
from alignkit.policies.reference import Anchor
from alignkit.policies.store import row_key, store_lock
from alignkit.policies.stored_laws import IDS, LABELS, LOGPROBS, top_law
from alignkit.policies.teacher import add_teacher
from alignkit.policies.teacher_signature import (
    Signature,
    damaged,
    metadata,
    shared_vocabulary,
    stored_file,
)

NAMES = (IDS, LOGPROBS, LABELS)

Laws = dict[str, list[Tensor]]  # IDS, LOGPROBS, LABELS -> K x [T_k, ...]


def with_stored_teacher(
    pair: PolicyPair, bundles: Sequence[Bundle], teacher: TeacherConfig, model: ModelConfig
) -> list[Bundle]:
    """The bundles with the teacher's `teacher.top` most likely tokens at each position and the mass
    of all others in their tokens; read from `teacher.store` where it has them, and added to it
    where not. A teacher that has to be asked is loaded, if it is not there yet (`model` is the
    policy's section).

    ModelError where `top` does not leave a token out, ResourceError for a damaged file, or where
    the disk refuses.
    """
    assert teacher.top is not None
    if teacher.store is None:
        _load(pair, teacher, model)
        module = pair.anchors["teacher"].module
        if module is not None:
            pair.anchors["teacher"].vocabulary = module.vocabulary
        return _filled(bundles, _scored(pair, bundles, teacher.top))

    keys = [row_key(bundle) for bundle in bundles]
    file = stored_file(pair, teacher)
    stored = {} if file is None else _read(file)
    lacking = len(set(keys) - stored.keys())
    if lacking if pair.shards is None else pair.shards.any(lacking > 0):
        file, stored = _with_missing(pair, dict(zip(keys, bundles)), teacher, model, file)
    assert file is not None  # it has all rows now
    pair.anchors["teacher"].vocabulary = shared_vocabulary(file)
    pair.notes.append(f"teacher.store: {len(set(keys)) - lacking} rows read from {file}")
    return _filled(bundles, [stored[key] for key in keys])


def _with_missing(
    pair: PolicyPair,
    bundles: Mapping[bytes, Bundle],
    teacher: TeacherConfig,
    model: ModelConfig,
    known: Path | None,
) -> tuple[Path, dict[bytes, Laws]]:
    """The file that has laws for all of `bundles` now, and its content. `known` has some of them."""
    assert teacher.store is not None
    assert teacher.top is not None
    try:
        _load(pair, teacher, model)
    except ModelError as error:
        if known is None:
            raise
        raise ModelError(
            f"teacher.store: {known} does not have all rows of this run, and the teacher cannot be "
            f"asked for the others: {error}"
        ) from error

    signature = Signature.of(pair, teacher)
    folder = Path(teacher.store).expanduser()
    file = folder / signature.file_name
    lock = partial(store_lock, file)

    # Processes that share a model cannot wait for each other's lock while they score together.
    is_shared = pair.shards is not None
    with pair.together() if is_shared else lock():
        stored = _read(file)
        missing = {key: bundle for key, bundle in bundles.items() if key not in stored}
        scored = zip(missing, _scored(pair, list(missing.values()), teacher.top))
        if missing:
            with lock() if is_shared else nullcontext():
                stored = _read(file) | dict(scored)
                _write(file, stored, metadata(signature, teacher, file))
    return file, stored


def _load(pair: PolicyPair, teacher: TeacherConfig, model: ModelConfig) -> None:
    """Load the teacher, unless it is there. ModelError where `teacher.top` is too large for it."""
    anchor = pair.anchors.get("teacher")
    if anchor is None or anchor.module is None:
        add_teacher(pair, teacher, model)
    module = pair.anchors["teacher"].module
    vocabulary = (module and module.vocabulary) or pair.vocab_size
    if teacher.top is not None and teacher.top >= vocabulary:
        raise ModelError(
            f"teacher.top: {teacher.top} of a vocabulary of {vocabulary} tokens leaves none out; "
            "give fewer, or leave `top` out for the whole law"
        )


def release_teacher(pair: PolicyPair) -> None:
    """Let a teacher go that nothing will ask any more, since all its laws are in the bundles."""
    anchor = pair.anchors["teacher"]
    if pair.shards is not None and anchor.module is not None:
        pair.shards.forget(anchor.module)
    pair.anchors["teacher"] = Anchor("stored", vocabulary=anchor.vocabulary)


def _filled(bundles: Sequence[Bundle], laws: Sequence[Laws]) -> list[Bundle]:
    return [replace(b, tokens={**b.tokens, **law}) for b, law in zip(bundles, laws)]


@torch.no_grad()
def _scored(pair: PolicyPair, bundles: Sequence[Bundle], top: int) -> list[Laws]:
    """The teacher's laws at the tokens of each bundle; zeros where a token is not trained."""
    scored: dict[int, Laws] = {}
    for group in pair.micro_batches(bundles, SCORING_BUDGET):
        members = [bundles[i] for i in group]
        rows = build_rows(members, pair.layout, pair.device, packing=pair.packing)
        tensors = [_by_completion(rows, values) for values in _top(pair, rows, top)]

        at = 0
        for i, bundle in zip(group, members):
            ends = [len(ids) for ids in bundle.completions]
            scored[i] = {
                name: [values[at + k, :end].clone() for k, end in enumerate(ends)]
                for name, values in zip(NAMES, tensors)
            }
            at += len(ends)
    return [scored[i] for i in range(len(bundles))]


def _top(pair: PolicyPair, rows: Rows, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [M, top], log-probs [M, top + 1] and the labels' log-probs [M] of all trained tokens."""
    states = pair.states("teacher", rows)
    size = chunk_rows(pair.vocab_size, pair.device)
    ids: list[Tensor] = []
    laws: list[Tensor] = []
    labels: list[Tensor] = []

    for hidden, label in zip(states.hidden.split(size), rows.labels.split(size)):
        logprobs = states.head.logprobs(hidden)
        ids.append(logprobs.topk(top).indices)
        laws.append(top_law(logprobs, ids[-1]))
        labels.append(logprobs.gather(-1, label[:, None])[:, 0])
    return torch.cat(ids), torch.cat(laws), torch.cat(labels)


def _by_completion(rows: Rows, values: Tensor) -> Tensor:
    """Values of the trained tokens [M, ...] -> [N, T, ...] on the CPU, zeros elsewhere."""
    whole = values.new_zeros(rows.shape[0] * rows.shape[1], *values.shape[1:])
    whole[rows.targets] = values
    return whole.view(*rows.shape, *values.shape[1:]).cpu()


def _read(file: Path) -> dict[bytes, Laws]:
    """What a file holds. ResourceError where it is damaged."""
    if not file.exists():
        return {}
    try:
        content = load_file(file)
        intact = torch.equal(content.pop("digest"), _digest(content))
        lengths = content["lengths"].tolist()
        split = {name: iter(content[name].split(lengths)) for name in NAMES}
        keys = [key.tobytes() for key in content["keys"].numpy()]
        counts = content["completions"].tolist()
        laws = {
            key: {name: [next(split[name]) for _ in range(n)] for name in NAMES}
            for key, n in zip(keys, counts, strict=True)
        }
    except (SafetensorError, KeyError, ValueError, RuntimeError, StopIteration) as error:
        raise damaged(file) from error

    if not intact:
        raise damaged(file)
    return laws


def _write(file: Path, stored: Mapping[bytes, Laws], whose: Mapping[str, str]) -> None:
    rows = {name: [row for laws in stored.values() for row in laws[name]] for name in NAMES}
    content = {
        "keys": torch.tensor([list(key) for key in stored], dtype=torch.uint8),
        "completions": torch.tensor([len(laws[IDS]) for laws in stored.values()]),
        "lengths": torch.tensor([len(row) for row in rows[IDS]]),
        **{name: torch.cat(values) for name, values in rows.items()},
    }
    content["digest"] = _digest(content)
    with writing(file), replaced_file(file) as temporary:
        save_file(content, temporary, metadata=dict(whose))


def _digest(content: Mapping[str, Tensor]) -> Tensor:
    """The SHA-256 of the tensors of a file, [32] uint8."""
    parts = (content[name].contiguous().numpy().tobytes() for name in sorted(content))
    return torch.tensor(list(bytes.fromhex(sha256_of_parts(parts))), dtype=torch.uint8)
