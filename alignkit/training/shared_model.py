"""The finished model of a run whose weights are spread over the processes: all of them write it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from alignkit import files
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import ResourceError
from alignkit.training import checkpoint
from alignkit.training.run_folder import CARD, RunFolder


def save_shared_model(
    run: RunFolder,
    write: Callable[[Path], None],
    card: str,
    identity: Mapping[str, Any],
    accelerator: Accelerator,
) -> None:
    """`RunFolder.save_model` where `write` is called by all processes at once: `model/` appears
    whole or not at all. ResourceError on all of them where the disk refuses one.
    """
    temporary = run.model.with_name(f".tmp-{run.model.name}")
    try:
        with raise_on_all_ranks(accelerator), _explained(run):
            if run.writes:
                files.begun_folder(run.model)
        with raise_on_all_ranks(accelerator), _explained(run):
            write(temporary)
        with raise_on_all_ranks(accelerator), _explained(run):
            if run.writes:
                (temporary / CARD).write_text(card)
                # People edit the card, so its bytes are not vouched for.
                content = checkpoint.manifest_content(identity)
                files.write_manifest(temporary, content, without=[CARD])
                files.write_text(run.path / CARD, card)
                for path in temporary.rglob("*"):
                    files.fsync(path)
                files.appear(temporary, run.model)
    finally:
        if run.writes:
            files.abandon_folder(run.model)


@contextmanager
def _explained(run: RunFolder) -> Iterator[None]:
    """ResourceError for what the disk refuses inside the block."""
    try:
        yield
    except Exception as error:
        reason = files.refusal_of_disk(error)
        if reason is None:
            raise
        raise ResourceError(
            f"cannot write {run.model}: {reason}; free space. {run.last_good()}"
        ) from error
