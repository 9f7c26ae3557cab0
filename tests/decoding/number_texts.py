"""Texts that are the numbers of their tokens, and a reward for any of them."""


class Tokens:
    """A tokenizer whose texts are the numbers of the tokens."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids.tolist()))

    def get_vocab(self):
        return {str(token): token for token in range(4)}

    def __len__(self):
        return 4


def worth(prompts, completions, **_):
    """A number for any text, finished or not."""
    return [((7 * sum(map(int, text.split())) + len(text)) % 5) / 2 - 1 for text in completions]
