"""Whether the completions of a run end with the end token, for objectives that read a number there."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.batches import Bundle
from alignkit.errors import DataError


def check_row_ends(bundles: Sequence[Bundle], tokenizer: Any, where: str) -> None:
    """DataError for completions of `where` whose last trained token is not the end token.

    What a value head says at a token has read the tokens before it alone, so the number of a whole
    completion stands where its end token is predicted.
    """
    end = tokenizer.eos_token_id
    without = sum(
        not _ends(ids, mask, end)
        for bundle in bundles
        for ids, mask in zip(bundle.completions, bundle.masks)
    )
    if not without:
        return

    advice = "set data.append_eos=true, or for a chat take a template that writes it last"
    raise DataError(
        f"{where}: {without} completions do not end with the end token, where this objective reads "
        f"the reward of the whole completion; {'the tokenizer has none' if end is None else advice}"
    )


def _ends(ids: Tensor, mask: Tensor, end: int | None) -> bool:
    trained = ids[mask]
    return end is not None and len(trained) > 0 and int(trained[-1]) == end
