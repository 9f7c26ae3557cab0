"""The samples that are shown of every model: the first completion of a few prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.data.prompts import Prompt
from alignkit.evaluation.measure import LIVE, bundle_of
from alignkit.evaluation.measurements import Measured
from alignkit.policies.pair import PolicyPair
from alignkit.rollout.text import decode

SHOWN_PROMPTS = 8
Pieces = list[tuple[str, float | None]]  # text of a token, and its number


def shown_places(prompts: int) -> list[int]:
    """The prompts that are shown: spread over all, the first and the last included."""
    places = np.linspace(0, prompts - 1, SHOWN_PROMPTS).round().astype(int)
    return [int(place) for place in np.unique(places)]


def shown_samples(
    measured: Mapping[str, Measured], credits: Mapping[str, Sequence[Pieces] | None]
) -> list[dict[str, Any]]:
    """For each shown prompt its first completion by every model, as JSON: text, score, and where
    there are any the tokens with their numbers.
    """
    base = measured["base"]
    rows = []
    for number, place in enumerate(shown_places(len(base.prompts))):
        completions: dict[str, dict[str, Any]] = {}
        for name, model in measured.items():
            score = None if model.score is None else float(model.score[place, 0])
            completions[name] = {"text": model.texts[place][0], "score": score}
            pieces = credits.get(name)
            if pieces is not None:
                completions[name]["tokens"] = pieces[number]
        rows.append({"prompt": base.prompts[place], "completions": completions})
    return rows


@torch.no_grad()
def token_log_ratios(
    pair: PolicyPair, prompts: Sequence[Prompt], measured: Measured
) -> list[Pieces]:
    """Of each shown completion its tokens' texts with log policy - log reference, in nats: beta times
    that is the token's implicit reward, which is an advantage under the optimal soft Q function
    (Rafailov et al. 2024, arXiv:2404.12358).
    """
    places = shown_places(len(prompts))
    completions = [torch.tensor(measured.tokens[place][0]) for place in places]
    bundles = [bundle_of(prompts[place].ids, [ids]) for place, ids in zip(places, completions)]
    logps = pair.logps(bundles, LIVE)
    ratios = (logps.policy - logps.reference).cpu()
    return [
        list(zip(_pieces(pair.tokenizer, ids), row[: len(ids)].tolist(), strict=True))
        for ids, row in zip(completions, ratios)
    ]


def _pieces(tokenizer: Any, ids: Tensor) -> list[str]:
    """The text that each token adds to those before it. A token of which nothing is to be seen (the
    end token) is named.
    """
    texts = [decode(tokenizer, ids[: end + 1]) for end in range(len(ids))]
    pieces = [text[len(before) :] for before, text in zip(["", *texts], texts)]
    return [
        piece or f" {tokenizer.convert_ids_to_tokens(int(token))}"
        for piece, token in zip(pieces, ids)
    ]
