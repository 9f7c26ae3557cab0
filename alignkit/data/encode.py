"""Text as token ids: BOS once, EOS at most once, and what stands in for an empty prompt."""

from collections.abc import Sequence
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.errors import ModelError

Ids = list[int]


class TextEncoder:
    """A tokenizer under the rules for BOS and EOS. Chats are encoded as they are, because their
    template wrote both. Raises ModelError where `append_eos` asks for an EOS that there is not.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.adds_eos = self.eos is not None and tokenizer("a")["input_ids"][-1:] == [self.eos]

        # Some tokenizers use an unknown token without declaring it; their model knows it then.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        model = getattr(backend, "model", None)
        self.unknown: str | None = tokenizer.unk_token or getattr(model, "unk_token", None)
        self.unknown_id: int | None = None
        if self.unknown is not None:
            self.unknown_id = tokenizer.convert_tokens_to_ids(self.unknown)

        # The model remembers words. Where nothing cuts texts into words it would remember texts,
        # which seldom come again: that takes time, and 80 MiB for 10,000 short ones.
        if backend is not None and backend.pre_tokenizer is None:
            getattr(model, "_resize_cache", lambda capacity: None)(0)

        # text of each special token -> its id
        self.special: dict[str, int] = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))

        if config.append_eos is True and self.eos is None:
            raise ModelError(
                "data.append_eos=true, but the tokenizer has no EOS token; "
                "give it one or set append_eos to auto"
            )

    def encode(self, texts: Sequence[str], chat: bool) -> list[Ids]:
        """Token ids of each text, without a trailing EOS that the tokenizer would add. Equal texts
        are tokenised once.
        """
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []

        encoded = self.tokenizer(
            unique,
            add_special_tokens=not chat,
            split_special_tokens=self.config.split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        if self.adds_eos and not chat:
            encoded = [ids[:-1] for ids in encoded]

        ids_of = dict(zip(unique, encoded))
        return [ids_of[text] for text in texts]

    def has_second_bos(self, ids: Ids) -> bool:
        """Whether the text began with BOS and the tokenizer put another before it."""
        return self.bos is not None and ids[:2] == [self.bos, self.bos]

    def has_unknown(self, text: str, ids: Ids) -> bool:
        """Whether a part of `text` is only the unknown token in `ids`. Where that token is BOS or
        EOS too, as GPT-2's is, nobody can tell.
        """
        if self.unknown is None or self.unknown_id in (self.bos, self.eos):
            return False
        return self.unknown_id in ids and self.unknown not in text

    def without_second_bos(self, ids: Ids) -> Ids:
        """`ids` with one BOS where there were two."""
        return ids[1:] if self.has_second_bos(ids) else ids

    def ending(self, ids: Ids, chat: bool) -> Ids:
        """[EOS] where it belongs behind the finished text `ids`, else
        nothing; never a second one.
        """
        append_eos = self.config.append_eos
        wanted = not chat if append_eos == "auto" else append_eos
        if not wanted or self.eos is None or ids[-1:] == [self.eos]:
            return []
        return [self.eos]

    def common_bos(self, sequences: Sequence[Ids]) -> Ids:
        """[BOS] if every sequence begins with it, else nothing: all that an empty prompt can be."""
        if self.bos is not None and all(ids[:1] == [self.bos] for ids in sequences):
            return [self.bos]
        return []

    @property
    def stand_in(self) -> int | None:
        """The token that an empty prompt becomes: BOS, else EOS, else there is none."""
        return self.eos if self.bos is None else self.bos
