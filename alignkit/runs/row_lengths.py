"""Whether the rows of a run fit into the model's positions, before any time is spent on training."""

from collections.abc import Sequence

from alignkit.batches import Bundle
from alignkit.data.prompts import Prompt
from alignkit.data.stored import row_lengths
from alignkit.errors import DataError
from alignkit.policies.layout import used_tokens
from alignkit.policies.module import causal_lm, context_length, position_table
from alignkit.runs.context import RunContext


def check_row_lengths(context: RunContext, bundles: Sequence[Bundle], where: str) -> list[str]:
    """A warning on rows that are longer than what the model was
    made for; `where` names their source.

    Raises DataError where the model cannot read them: it has a table of positions, or is a reward
    or preference model.
    """
    # Some objectives score the rows once more behind a text of their own.
    prefixes = [
        len(context.pair.tokenizer(text, add_special_tokens=False).input_ids)
        for text in context.plan.prefixes.values()
    ]
    longest_prefix = max(prefixes, default=0)
    # No row is longer than its tokens are many.
    limit, is_table = _positions(context)
    if max(row_lengths(bundles), default=0) + longest_prefix <= limit:
        return []

    # A scorer reads whole rows, a language model all tokens but the last.
    reads_all = context.plan.outputs
    lengths = [
        _tokens_of(bundle) if reads_all else positions_of(bundle) + longest_prefix
        for bundle in bundles
    ]
    beyond = [i for i, length in enumerate(lengths) if length > limit]
    if not beyond:
        return []
    counted = (
        f"{where}: {len(beyond)} of {len(lengths)} rows are longer than the {limit} positions "
        f"of the model (the longest: {max(_tokens_of(bundles[i]) for i in beyond)} tokens)"
    )
    advice = f"set data.max_length={limit - longest_prefix + (not reads_all)} or lower"
    if is_table or reads_all:
        raise DataError(f"{counted}; {advice}")
    return [f"warning: {counted}, which it may read badly; {advice}"]


def positions_of(bundle: Bundle) -> int:
    """How many positions the longest row of a bundle takes: those of the prompt and of a
    completion's tokens before its last trained one, which is predicted and never read.
    """
    return len(bundle.prompt) + max(map(used_tokens, bundle.masks))


def _tokens_of(bundle: Bundle) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(bundle.prompt) + max(map(len, bundle.completions))


def check_prompt_lengths(context: RunContext, prompts: Sequence[Prompt], where: str) -> list[str]:
    """An empty list. DataError where a prompt leaves no room for `rollout.max_new_tokens`, which
    sampling would refuse in the step that draws it.
    """
    limit, _ = _positions(context)
    rollout = context.recipe.rollout
    new_tokens = rollout.max_new_tokens
    longest = max(len(prompt.ids) for prompt in prompts)

    # The last new token is drawn and never read, though vLLM counts it.
    room = limit - new_tokens + (rollout.engine != "vllm")
    crowded = sum(len(prompt.ids) > room for prompt in prompts)
    if crowded:
        advice = f"set data.max_length={room + 1} to drop them, or " if room > 0 else ""
        raise DataError(
            f"{where}: {crowded} of {len(prompts)} prompts (the longest: {longest} tokens) and "
            f"{new_tokens} new tokens exceed the {limit} positions of the model; {advice}"
            "lower rollout.max_new_tokens"
        )
    return []


def _positions(context: RunContext) -> tuple[int, bool]:
    """How many positions the model reads at once, and whether it has no others."""
    with context.pair.model("policy") as model:
        table = position_table(causal_lm(model))
        return (context_length(model), False) if table is None else (table, True)
