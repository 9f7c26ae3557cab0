"""Fixed rows with what frozen models say about them, scored once before training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from alignkit.batches import Bundle
from alignkit.errors import ConfigError
from alignkit.policies.lazy import Selected, changed
from alignkit.policies.store import cached_in
from alignkit.runs.context import RunContext
from alignkit.runs.teacher import with_teacher
from alignkit.sources.dataset import Order


def scored_where_visited(
    context: RunContext, bundles: Sequence[Bundle], order: Order
) -> Sequence[Bundle]:
    """The bundles as `scored` leaves them, but only those that the run visits in `order`: a run of a
    few steps on many rows begins at once. What is to be stored for other runs is scored whole.
    """
    teacher = context.recipe.teacher
    is_stored = context.recipe.reference.store or (teacher and teacher.store)
    visits = context.steps(len(bundles)) * context.recipe.train.batch_size
    if is_stored or visits >= order.n:
        return scored(context, bundles)

    places = sorted(set(order[:visits]))
    visited = scored(context, Selected(bundles, places))
    number = {place: i for i, place in enumerate(places)}
    return changed(
        bundles, lambda place, bundle: visited[number[place]] if place in number else bundle
    )


def scored(context: RunContext, bundles: Sequence[Bundle]) -> Sequence[Bundle]:
    """The bundles with everything that the plan wants to know of them beforehand."""
    if context.pair.reference_kind == "cached" and "reference" in context.plan.anchors:
        bundles = _with_reference(context, bundles)
    bundles = with_teacher(context, bundles)
    for name, text in context.plan.prefixes.items():
        bundles = _with_prefixed_reference(context, bundles, name, text)
    return bundles


def _with_reference(context: RunContext, bundles: Sequence[Bundle]) -> Sequence[Bundle]:
    """The bundles with the reference's log-probs of their tokens.

    Each rank scores its share, or reads it from `reference.store`; the shares are then exchanged.
    """
    rank = context.rank
    processes = context.processes
    store = context.recipe.reference.store

    share = bundles[rank::processes]
    # A process without a share takes part where the model is spread over all.
    takes_part = bool(share) or context.pair.shards is not None
    if takes_part and store:
        share = cached_in(Path(store).expanduser(), context.pair, share, context.plan)
    elif takes_part:
        share = context.pair.cached(share, context.plan)
    if processes == 1:
        return share

    # Rank r scored the bundles at places r, r + processes, r + 2 * processes, ...
    # As arrays: a tensor that is a part of another one would be sent with all of it.
    own = [[logps.numpy() for logps in bundle.tokens["reference"]] for bundle in share]
    shares = gather_object([own])

    def filled(place: int, bundle: Bundle) -> Bundle:
        reference = list(map(torch.from_numpy, shares[place % processes][place // processes]))
        return replace(bundle, tokens={**bundle.tokens, "reference": reference})

    return changed(bundles, filled)


def _with_prefixed_reference(
    context: RunContext, bundles: Sequence[Bundle], name: str, text: str
) -> Sequence[Bundle]:
    """The bundles with tokens[name]: the reference's log-probs where `text` stands before the
    prompt, behind a start token if there is one.
    """
    tokenizer = context.pair.tokenizer
    prefix = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    if not len(prefix):
        raise ConfigError(
            f"objective.{name}: the tokenizer makes no token of {text!r}; give a text"
        )

    prefixed = []
    for bundle in bundles:
        has_start = (
            tokenizer.bos_token_id is not None and bundle.prompt[0] == tokenizer.bos_token_id
        )
        first = int(has_start)
        prompt = torch.cat([bundle.prompt[:first], prefix, bundle.prompt[first:]])
        prefixed.append(replace(bundle, prompt=prompt, tokens={}))

    answers = _with_reference(context, prefixed)
    return [
        replace(bundle, tokens={**bundle.tokens, name: other.tokens["reference"]})
        for bundle, other in zip(bundles, answers)
    ]
