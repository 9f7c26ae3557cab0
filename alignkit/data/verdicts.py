"""Everything that can be wrong with a row, or worth a word.

A row can get several verdicts. What follows from one depends on its severity: an error stops the
run, or drops the row where `data.on_bad_row` is drop; a dropped row is always left out; rows with a
warning or a note stay.
"""

from typing import Literal

Severity = Literal["error", "dropped", "warning", "note"]

# verdict -> (severity, what it means and what to do)
VERDICTS: dict[str, tuple[Severity, str]] = {
    "unreadable": (
        "error",
        "a line that is not one JSON object in UTF-8, or longer than the limit",
    ),
    "missing": ("error", "a needed column is missing"),
    "null": ("error", "a needed value is null"),
    "type": ("error", "a value has the wrong type"),
    "messages": ("error", 'not a list of messages [{"role": "user", "content": "..."}]'),
    "role": ("error", "an unknown role, or turns that end with the wrong role"),
    "surrogate": ("error", "characters that are not valid Unicode"),
    "both_empty": ("error", "chosen and rejected are both empty"),
    "template": ("error", "the chat template refuses the conversation"),
    "contradicting_prompt": ("error", "the prompt and the dialogues beside it disagree"),
    "empty": ("dropped", "an empty completion"),
    "identical": ("dropped", "chosen equals rejected"),
    "untrained": ("dropped", "no turn is left to learn from: weight is 0 or trainable is false"),
    "overlong": ("dropped", "no completion token is left within data.max_length"),
    "no_prompt": (
        "dropped",
        "an empty prompt, and the tokenizer has neither BOS nor EOS to stand in for it",
    ),
    "no_common_prefix": ("warning", "chosen and rejected of an implicit prompt share no beginning"),
    "contradictory": (
        "warning",
        "the same pair occurs with chosen and rejected swapped, or a completion with both labels",
    ),
    "truncated": ("warning", "rows cut at data.max_length"),
    "special_tokens": (
        "warning",
        "special tokens inside the text; data.split_special_tokens=true reads them as plain text",
    ),
    "prompt_repeated": (
        "warning",
        "both completions begin with the prompt; data.format=implicit_pair reads it once",
    ),
    "beyond_context": (
        "warning",
        "longer than the tokenizer's model_max_length; lower data.max_length",
    ),
    "untrained_turn": (
        "warning",
        "an assistant turn that the chat template rewrites is left out of the loss",
    ),
    "words_dropped": (
        "warning",
        "words of the assistant are not in the loss: the chat template leaves them out, rewrites "
        "them, or moves them behind a tool's answer; use one that writes them in their turn",
    ),
    "message_dropped": (
        "warning",
        "the chat template leaves out or rewrites what a turn says that is not the assistant's; use "
        "one that writes it as it is",
    ),
    "system_unused": (
        "warning",
        "the column system is not used: a text that is trained as a whole, or an implicit prompt of "
        "texts, has no place for it; put it into a prompt column, or into messages",
    ),
    "prompt_trained": (
        "warning",
        "the chat template writes the prompt otherwise when an answer follows, so the prompt is "
        "trained as part of the answer; use one that writes the same beginning for both",
    ),
    "one_label": (
        "warning",
        "every label is the same, so nothing says what to avoid (or what to prefer); add rows with "
        "the other label",
    ),
    "no_margin": (
        "warning",
        "other rows have a margin and these have none, which counts as 0; give every row one",
    ),
    "prompt_unread": (
        "warning",
        "a column named as prompts are is not read, and chosen and rejected do not hold it; "
        "map it with data.columns.prompt=NAME",
    ),
    "media_unread": (
        "warning",
        "images, videos and sounds beside the text are not read: models are trained on text alone",
    ),
    "unknown_tokens": (
        "warning",
        "words that the tokenizer does not know: their place is taken by its unknown token",
    ),
    "thoughts_dropped": (
        "warning",
        "the chat template leaves out thoughts of the assistant; use one that keeps them",
    ),
    "calls_dropped": (
        "warning",
        "the chat template leaves out tool calls of the assistant; use one that writes them",
    ),
    "no_end": (
        "warning",
        "the chat template ends the completion without a special token: "
        "the model is not taught to stop",
    ),
    "duplicate": ("note", "the row repeats an earlier one (kept)"),
    "boundary": ("note", "a token spans the end of the prompt; it belongs to the completions"),
    "bos_once": (
        "note",
        "the text began with BOS and the tokenizer added another; one was removed",
    ),
    "empty_prompt": ("note", "an empty prompt"),
    "plain_text": (
        "note",
        "plain text is read without the model's chat template; write the prompt as messages "
        "to have it applied",
    ),
    "messages_as_text": ("note", "a list of messages was written as text, and is read as a list"),
    "nulls_dropped": (
        "note",
        "nulls inside tool calls, tools and template options are left out; "
        "Arrow adds them for keys that other rows have",
    ),
    "unpaired": ("note", "the pair becomes two labelled completions, chosen and rejected"),
    "reserved_column": ("note", "columns whose names rewards use otherwise are not handed to them"),
}


class BadRow(Exception):
    """A row that gets `verdict`, a key of VERDICTS, and leaves the data."""

    def __init__(self, verdict: str, detail: str = "") -> None:
        super().__init__(detail)
        self.verdict = verdict
        self.detail = detail
