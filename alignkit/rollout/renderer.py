"""What an environment says, as the tokens that the policy reads; and what the policy has drawn, as
what an environment reads.

Tokens that the policy has drawn are never decoded and encoded again. Where a chat template repeats
history word for word, a turn of the environment is the difference of two renderings of a dummy
conversation, behind the end token that the policy has drawn itself (as in TRL 1.16). Where it
rewrites history (it strips the thoughts of earlier turns), `rewrites` says so, and each turn begins
with a new rendering of the whole conversation.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from alignkit.config.data import DataConfig
from alignkit.data.encode import Ids, TextEncoder
from alignkit.data.template import ChatTemplate
from alignkit.errors import ConfigError
from alignkit.rollout.text import decode

Message = dict[str, Any]

# How models of the Hermes and Qwen families write a call, read where a tokenizer does not say.
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_DUMMY = {"role": "user", "content": "dummy"}
_THOUGHT = "<think>\ndummy\n</think>\n\ndummy"


class Renderer(Protocol):
    """Between tokens and messages."""

    @property
    def rewrites(self) -> bool:
        """Whether a later rendering does not begin with an earlier one."""
        ...

    def opened(self, prompt: Any, text: str | None) -> Any:
        """The prompt with what `reset` adds to it, in the prompt's form."""
        ...

    def start(self, prompt: Any) -> Tensor:
        """Tokens [P] that the first turn continues."""
        ...

    def follow(self, messages: Sequence[Message]) -> Tensor:
        """Tokens [F] of the environment's messages between two turns of the policy."""
        ...

    def read(self, context: Tensor, ids: Tensor) -> Message:
        """A turn of the policy, drawn after `context`, as a message."""
        ...


class TextRenderer:
    """Plain text: what the environment says follows the end token as it is."""

    rewrites = False

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer, config)

    def opened(self, prompt: str, text: str | None) -> str:
        """See `Renderer.opened`."""
        return prompt + (text or "")

    def start(self, prompt: str) -> Tensor:
        """See `Renderer.start`."""
        (ids,) = self.encoder.encode([prompt], chat=False)
        return torch.tensor(self.encoder.without_second_bos(ids), dtype=torch.int64)

    def follow(self, messages: Sequence[Message]) -> Tensor:
        """See `Renderer.follow`."""
        (ids,) = self.encoder.encode(["".join(m["content"] for m in messages)], chat=True)
        return torch.tensor(ids, dtype=torch.int64)

    def read(self, context: Tensor, ids: Tensor) -> Message:
        """See `Renderer.read`."""
        return {"role": "assistant", "content": decode(self.tokenizer, ids)}


class ChatRenderer:
    """Messages through the chat template, with the schemas of the tools."""

    def __init__(
        self,
        tokenizer: Any,
        config: DataConfig,
        schemas: Sequence[Mapping[str, Any]] = (),
        stops: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config)
        self.encoder = TextEncoder(tokenizer, config)
        self.options = {"tools": list(schemas)} if schemas else {}
        self.stops = set(stops)
        if schemas:
            self._check_tools()
        self.rewrites = self._rewrites()

    def opened(self, prompt: list[Message], text: str | None) -> list[Message]:
        """See `Renderer.opened`: the text goes to the end of the last message."""
        if text is None:
            return prompt
        last = prompt[-1]
        return [*prompt[:-1], {**last, "content": last["content"] + text}]

    def start(self, prompt: list[Message]) -> Tensor:
        """See `Renderer.start`."""
        return torch.tensor(self._ids(prompt, open_turn=True, **self.options), dtype=torch.int64)

    def follow(self, messages: Sequence[Message]) -> Tensor:
        """See `Renderer.follow`."""
        before = [_DUMMY, self._answer_before(messages)]
        shorter = self._up_to_end(self._ids(before, open_turn=False))
        longer = self._ids([*before, *messages], open_turn=True)
        if longer[: len(shorter)] != shorter:
            raise ConfigError(
                "the chat template writes a conversation otherwise once it goes on, so that the "
                "words of the environment cannot be told apart; set data.chat_template to one that "
                "repeats what came before"
            )
        return torch.tensor(longer[len(shorter) :], dtype=torch.int64)

    def read(self, context: Tensor, ids: Tensor) -> Message:
        """See `Renderer.read`; with "tool_calls" where the turn calls tools."""
        if getattr(self.tokenizer, "response_template", None) is not None:
            message = self._parsed(context, ids)
            if message is not None:
                return message

        content = decode(self.tokenizer, ids)
        calls = [_call(match) for match in _CALL.findall(content)] if self.options else []
        if not calls or any(call is None for call in calls):
            return {"role": "assistant", "content": content}
        return {
            "role": "assistant",
            "content": _CALL.sub("", content).strip(),
            "tool_calls": [{"type": "function", "function": call} for call in calls],
        }

    def _parsed(self, context: Tensor, ids: Tensor) -> Message | None:
        """The message that the tokenizer's own response template reads; None where it cannot."""
        try:
            message = self.tokenizer.parse_response(
                ids.tolist(), prefix=context.tolist(), tools=self.options.get("tools")
            )
        except (ValueError, TypeError):
            return None
        if not isinstance(message, dict):
            return None

        content = message.get("content") or ""
        message["content"] = content.removesuffix(self.tokenizer.eos_token or "")
        calls = message.get("tool_calls") or []
        whole = all(
            isinstance(call.get("function", {}).get("arguments"), dict)
            and call["function"].get("name")
            for call in calls
        )
        return message if whole else None

    def _answer_before(self, messages: Sequence[Message]) -> Message:
        """A turn of the assistant that `messages` may follow. Some templates name a result by the
        call before it.
        """
        if messages and messages[0]["role"] == "tool":
            function = {"name": messages[0]["name"], "arguments": {}}
            call = {"type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"role": "assistant", "content": "dummy"}

    def _ids(self, messages: Sequence[Message], *, open_turn: bool, **options: Any) -> Ids:
        text = self.template.text(list(messages), options, prompt=open_turn)
        (ids,) = self.encoder.encode([text], chat=True)
        return self.encoder.without_second_bos(ids)

    def _up_to_end(self, ids: Ids) -> Ids:
        """`ids` up to the last end token: what a template writes behind it is no longer the
        policy's turn.
        """
        ends = [place for place, token in enumerate(ids) if token in self.stops]
        return ids[: ends[-1] + 1] if ends else ids

    def _rewrites(self) -> bool:
        """Renders one conversation of two turns, with a thought in the first."""
        thought = {"role": "assistant", "content": _THOUGHT}
        more = {"role": "user", "content": "dummy"}
        shorter = self._up_to_end(self._ids([_DUMMY, thought], open_turn=False))
        longer = self._ids([_DUMMY, thought, more], open_turn=True)
        return longer[: len(shorter)] != shorter

    def _check_tools(self) -> None:
        """ConfigError where the template swallows calls or their results."""
        call = {"name": "name_a8f3", "arguments": {"key_b9d4": "value_d6e7"}}
        turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
        turn["tool_calls"][0]["function"] = call  # type: ignore[index]
        result = {"role": "tool", "name": "name_a8f3", "content": "content_c4f9"}
        text = self.template.text([_DUMMY, turn, result], dict(self.options), prompt=True)

        missing = [
            word
            for word in ("name_a8f3", "key_b9d4", "value_d6e7", "content_c4f9")
            if word not in text
        ]
        if missing:
            raise ConfigError(
                "the chat template leaves out calls of tools or their results; use a model whose "
                "template writes them, or set data.chat_template"
            )


def _call(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None
