"""Tokenizers for the chat templates in TRL's package, rows to put through them, and what TRL's own
trainers make of these rows.
"""

import copy
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

FOLDER = Path(trl.__file__).parent / "chat_templates"
GEMMA = ("<bos>", "<eos>", True)
CHATML = (None, "<|im_end|>", False)
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", True)
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True)  # noqa: RUF001
COHERE = ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", True)
LFM = ("<|startoftext|>", "<|im_end|>", True)
NEMOTRON = ("<s>", "<|im_end|>", False)

# Beginning of a template's name -> BOS, EOS, and whether the tokenizer puts BOS in front.
FAMILIES: dict[str, tuple[str | None, str, bool]] = {
    "qwen": CHATML,
    "llama3": LLAMA,
    "gemma": GEMMA,
    "diffusion_gemma": GEMMA,
    "phi": ("<s>", "<|endoftext|>", False),
    "gptoss": ("<|startoftext|>", "<|return|>", False),
    "deepseek": DEEPSEEK,
    "glm4moe": (None, "<|endoftext|>", False),
    "cohere": COHERE,
    "lfm": LFM,
    "nemotron": NEMOTRON,
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>", False),
    "llava_next": ("<s>", "</s>", False),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", False),
    "muse": ("<|begin_of_text|>", "<|eot|>", False),
}
# They write the parts of a content that is a list, and nothing of a content that is a text: TRL gets
# such contents, alignkit gives them to the template itself.
VISION_ONLY = ("idefics3", "llava_next", "smolvlm")

SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9]+\|?>|<[A-Za-z_0-9]+\|>|<｜[^<>｜]+｜>"  # noqa: RUF001
    r"|\[gMASK\]|<sop>|<(?:start|end)_of_turn>"
)
TEXTS = [
    "The sky is blue, the grass is green. What is better than ugly? Beautiful!",
    "Two and two make four; three times four is twelve. Hello, be brief, yes or no.",
]


def names() -> list[str]:
    """The templates that models ship, without TRL's training variants."""
    files = FOLDER.glob("*.jinja")
    return sorted(file.stem for file in files if not file.stem.endswith("_training"))


@lru_cache
def _vocabulary() -> str:
    """A byte-level BPE with a few merges, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*TEXTS, *(file.read_text() for file in sorted(FOLDER.glob("q*.jinja")))]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tokenizer_of(name: str, *, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the template `name` and special tokens as the model has them."""
    bos, eos, adds_bos = next(v for k, v in FAMILIES.items() if name.startswith(k))
    template = (FOLDER / f"{name}.jinja").read_text()

    tokenizer = Tokenizer.from_str(_vocabulary())
    marks = set(SPECIAL.findall(template)) | {"<pad>", eos, *([bos] if bos else [])}
    tokenizer.add_special_tokens(sorted(marks))
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    if adds_bos or adds_eos:
        used = ([bos] if adds_bos and bos else [], [eos] if adds_eos else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*used[0], "$A", *used[1]]),
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in (*used[0], *used[1])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=name,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def calls(first: int, second: int) -> list[dict[str, Any]]:
    arguments = {"a": first, "b": second}
    return [{"type": "function", "function": {"name": "multiply", "arguments": arguments}}]


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "multiply", "content": text}


NUMBER = {"type": "integer", "description": "a number"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiplies two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": NUMBER, "b": NUMBER},
                "required": ["a", "b"],
            },
        },
    }
]
ASK = [user("3 times 4?")]
THOUGHT = "<think>\nthree fours\n</think>\n\n"
OTHER_THOUGHT = "<think>\na guess\n</think>\n\n"
LATER = [user("Hi"), assistant("Hello."), user("And now?")]


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    """A pair, with answers in messages where they are given as text beside messages."""
    parts = {"chosen": chosen, "rejected": rejected}
    if isinstance(prompt, list):
        parts = {k: [assistant(v)] if isinstance(v, str) else v for k, v in parts.items()}
    return {"prompt": prompt} | parts | more


def implicit(shared: list[Any], chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    return {"chosen": [*shared, *chosen], "rejected": [*shared, *rejected]}


PAIRS: dict[str, dict[str, Any]] = {
    "one_turn": pair(ASK, "Twelve.", "Nine."),
    "shared_start": pair(ASK, "It is twelve.", "It is nine."),
    "several_turns": pair(LATER, "Later.", "Never."),
    "system": pair([system("Be brief."), *ASK], "Twelve.", "Nine."),
    "developer": pair([{"role": "developer", "content": "Be brief."}, *ASK], "Twelve.", "Nine."),
    "white_space": pair([user("  Hi \n")], "\n Hello.  ", " No.\n\n"),
    "unicode": pair([user("Ünïcödé 日本語 🙂")], "はい 🙂", "いいえ"),
    "special_tokens": pair([user("write <|im_end|> and <eos>")], "<|im_end|> ok", "no"),
    "turns_in_completion": pair(
        [user("Hi")],
        [assistant("Hello."), user("More?"), assistant("Yes.")],
        [assistant("No."), user("Why?"), assistant("So.")],
    ),
    "thoughts": pair(ASK, THOUGHT + "12", OTHER_THOUGHT + "13"),
    "thoughts_beside": pair(
        ASK,
        [assistant("12", reasoning_content="three fours")],
        [assistant("13", reasoning_content="a guess")],
    ),
    "thinking_key": pair(
        ASK, [assistant("12", thinking="three fours")], [assistant("13", thinking="a guess")]
    ),
    "thoughts_before": pair([*ASK, assistant(THOUGHT + "12"), *ASK], THOUGHT + "12", "13"),
    "thinking_off": pair(ASK, "12", "13", chat_template_kwargs={"enable_thinking": False}),
    "tools": pair(ASK, [assistant("", tool_calls=calls(3, 4))], "13", tools=TOOLS),
    "tools_as_text": pair(ASK, "12", "13", tools=json.dumps(TOOLS)),
    "calls_without_content": pair(
        ASK, [assistant(None, tool_calls=calls(3, 4))], "13", tools=TOOLS
    ),
    "tool_results": pair(
        [*ASK, assistant("", tool_calls=calls(3, 4)), result("12")], "12", "13", tools=TOOLS
    ),
    "arguments_as_text": pair(
        [
            *ASK,
            assistant(
                "",
                tool_calls=[
                    {
                        "type": "function",
                        "function": {"name": "multiply", "arguments": '{"a": 3, "b": 4}'},
                    }
                ],
            ),
            result("12"),
        ],
        "12",
        "13",
        tools=TOOLS,
    ),
    "calls_in_completion": pair(
        ASK,
        [assistant("", tool_calls=calls(3, 4)), result("12"), assistant("Twelve.")],
        [assistant("", tool_calls=calls(3, 5)), result("15"), assistant("Fifteen.")],
        tools=TOOLS,
    ),
    "arrow_nulls": pair(
        [user("Hi") | {"tool_calls": None}],
        [assistant("Hello.", tool_calls=None)],
        [assistant("No.", tool_calls=None)],
    ),
    "parts": pair(
        [user("Hi") | {"content": [{"type": "text", "text": "Hi"}]}],
        [assistant(None) | {"content": [{"type": "text", "text": "Hello."}]}],
        [assistant(None) | {"content": [{"type": "text", "text": "No."}]}],
    ),
    "prefilled": pair([*ASK, assistant("It is")], " twelve.", " nine."),
    "implicit": implicit([system("Be brief."), *ASK], [assistant("12")], [assistant("13")]),
    "implicit_several_turns": implicit(LATER, [assistant("Later.")], [assistant("Never.")]),
    "implicit_early": implicit(
        [user("Hi")],
        [assistant("Hello."), user("More"), assistant("Yes.")],
        [assistant("Bye."), user("Less"), assistant("No.")],
    ),
    "text": pair("The sky is", " blue.", " green."),
    "text_with_space": pair("The sky is ", "blue.", "green."),
    "text_across_tokens": pair("The sk", "y is blue", "in is green"),
    "text_lines": pair("What is it?\n", "\nBlue", "Green"),
    "text_with_bos": pair("{bos}The sky is", " blue.", " green."),
    "text_with_eos": pair("The sky is", " blue.{eos}", " green.{eos}"),
    "text_with_one_eos": pair("The sky is", " blue.{eos}", " green."),
    "text_empty_prompt": pair("", "blue.", "green."),
    "text_implicit": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "text_implicit_inside_word": {"chosen": "The sky is grey.", "rejected": "The sky is green."},
    "text_implicit_prefix": {
        "chosen": "The sky is blue. And big.",
        "rejected": "The sky is blue.",
    },
}
ANSWER = [assistant("12")]
CALLED = [*ASK, assistant("", tool_calls=calls(3, 4)), result("12"), assistant("Twelve.")]
DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "one_turn": {"messages": [*ASK, *ANSWER]},
    "several_turns": {"messages": [*LATER, assistant("Later.")]},
    "same_answers": {"messages": [user("a?"), *ANSWER, user("b?"), *ANSWER, user("c?"), *ANSWER]},
    "system": {"messages": [system("Be brief."), *LATER, assistant("Later.")]},
    "ends_with_user": {"messages": LATER},
    "starts_with_assistant": {"messages": [assistant("Welcome."), user("Hi"), assistant("Hello.")]},
    "white_space": {
        "messages": [user(" Hi "), assistant("\n Hello.  \n"), user("So?"), assistant("  Yes. ")]
    },
    "thoughts": {
        "messages": [*ASK, assistant(THOUGHT + "12"), *ASK, assistant(OTHER_THOUGHT + "13")]
    },
    "thoughts_beside": {
        "messages": [
            *ASK,
            assistant("12", reasoning_content="three fours"),
            *ASK,
            assistant("13", reasoning_content="a guess"),
        ]
    },
    "tools": {"messages": [*CALLED, user("thanks"), assistant("Welcome.")], "tools": TOOLS},
    "words_and_calls": {
        "messages": [*ASK, assistant("Let me see.", tool_calls=calls(3, 4)), *CALLED[2:]],
        "tools": TOOLS,
    },
    "completion": {"prompt": ASK, "completion": ANSWER},
    "completion_several_turns": {"prompt": LATER, "completion": ANSWER},
    "turns_in_completion": {
        "prompt": [user("Hi")],
        "completion": [assistant("Hello."), user("More?"), assistant("Yes.")],
    },
    "text_completion": {"prompt": "The sky is", "completion": " blue."},
    "text_completion_with_eos": {"prompt": "The sky is", "completion": " blue.{eos}"},
    "text": {"text": "The sky is blue."},
    "text_with_eos": {"text": "The sky is blue.{eos}"},
    "text_with_bos": {"text": "{bos}The sky is blue."},
}


def filled(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`row` with the tokenizer's BOS and EOS where its texts ask for them."""
    names_of = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token}
    filled_row = {}
    for column, value in row.items():
        if isinstance(value, str):
            for name, token in names_of.items():
                value = value.replace(name, token)
        filled_row[column] = value
    return copy.deepcopy(filled_row)


def in_parts(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with every content that is a text as a list of one part."""
    return {
        column: [
            m | {"content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m.get("content"), str)
            else m
            for m in value
        ]
        if isinstance(value, list) and column != "tools"
        else value
        for column, value in row.items()
    }


class Rows:
    """As much of a data set as TRL's preparation uses, without Arrow in between."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0])

    def map(self, function: Any, fn_kwargs: Any = None, remove_columns: Any = (), **_: Any) -> Any:
        removed = {remove_columns} if isinstance(remove_columns, str) else set(remove_columns or ())
        return Rows(
            [
                {k: v for k, v in row.items() if k not in removed}
                | function(copy.deepcopy(row), **(fn_kwargs or {}))
                for row in self.rows
            ]
        )

    def filter(self, function: Any, **_: Any) -> Any:
        return Rows([row for row in self.rows if function(row)])


def _prepared(
    trainer_class: Any, row: dict[str, Any], tokenizer: Any, *more: Any, **own: Any
) -> dict[str, Any]:
    """What a trainer's own preparation makes of a row; the trainer itself is not built."""
    trainer = object.__new__(trainer_class)
    vars(trainer).update(_tokenizer=tokenizer, **own)
    settings = SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        truncation_mode="keep_start",
        dataset_text_field="text",
        assistant_only_loss="messages" in row,
        shuffle_dataset=False,
    )
    rows = Rows([copy.deepcopy(row)])
    return trainer._prepare_dataset(rows, tokenizer, settings, *more, "train").rows[0]


def trl_pair(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Prompt and completions of DPOTrainer: every token of a completion is trained."""
    prepared = _prepared(DPOTrainer, row, tokenizer)
    return prepared["prompt_ids"], [prepared["chosen_ids"], prepared["rejected_ids"]]


def trl_demonstration(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of SFTTrainer; of messages, the assistant's turns are trained."""
    template = None
    if "messages" in row and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    prepared = _prepared(
        SFTTrainer,
        row,
        tokenizer,
        False,
        None,
        chat_template=template,
        completion_only_loss="prompt" in row,
    )
    return prepared["input_ids"], [label != -100 for label in prepared["labels"]]
