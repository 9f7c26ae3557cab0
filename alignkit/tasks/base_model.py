"""Base models of the embedded tasks: a word-level tokenizer and a small Llama, trained from scratch
by `sft`.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.config.data import DataConfig
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig

if TYPE_CHECKING:
    from alignkit.training.job import Job
    from alignkit.training.run_folder import RunFolder

EOS = "<eos>"
UNKNOWN = "<unk>"
WATCH_EVERY = 5  # steps between two looks at a base model that is to be stopped early


class _Enough(Exception):
    """Ends the training of a base model."""


@dataclass(frozen=True)
class BaseConfig:
    """Size and training of a base model."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 6e-3
    seed: int = 0


def word_tokenizer(words: Sequence[str]):
    """A fast tokenizer whose tokens are the words of texts, split at white space, after EOS and
    UNKNOWN (ids 0 and 1).

    EOS is the one special token (it pads too), so that decoding hides nothing else that a model
    writes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=EOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def character_tokenizer(characters: Sequence[str]):
    """A fast tokenizer whose tokens are single characters, after EOS and UNKNOWN (ids 0 and 1)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate((EOS, UNKNOWN, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=EOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def train_base(
    config: BaseConfig,
    words: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    folder: Path,
    make_tokenizer: Callable[[Sequence[str]], Any] = word_tokenizer,
    enough: Callable[[Any], bool] | None = None,
) -> Path:
    """Train a Llama on `rows` (prompt, completion) with alignkit's own loop; `folder`/model is what
    `from_pretrained` loads.

    `enough` is asked with the policy pair every few steps; training ends where it says True, or
    after `config.steps`.
    """
    from alignkit.training.loop import train
    from alignkit.training.run_folder import RunFolder

    start = _untrained(config, make_tokenizer(words), folder / "untrained")
    with RunFolder(folder / "run") as run, suppress(_Enough):
        job = _job(config, rows, start, run, enough)
        train(job)
    job.pair.save(folder / "model")
    for left in (run.path, start):
        shutil.rmtree(left)
    return folder / "model"


def _job(
    config: BaseConfig,
    rows: Sequence[Mapping[str, str]],
    start: Path,
    run: "RunFolder",
    enough: Callable[[Any], bool] | None,
) -> "Job":
    """Supervised fine-tuning of the model in `start`, which `enough` may end."""
    from accelerate import Accelerator

    from alignkit.data.load import load_bundles
    from alignkit.objectives.preference.sft import SFT
    from alignkit.policies.load import load_pair
    from alignkit.sources.dataset import DatasetSource
    from alignkit.training.job import Job

    objective = SFT()
    model = ModelConfig(name_or_path=str(start))
    pair = load_pair(model, ReferenceConfig(), None, objective.plan, device="cpu", fixed_data=True)
    bundles, _ = load_bundles(DataConfig(), "sequence", pair.tokenizer, source=rows)
    settings = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        eval_every=0,
        save_every=0,
        log_samples_every=WATCH_EVERY if enough else 0,
    )

    def watch(step: int) -> list[dict[str, Any]]:
        if step and enough is not None and enough(pair):
            raise _Enough
        return []

    source = DatasetSource(bundles, objective.plan, config.batch_size, seed=config.seed)
    return Job(
        objective, pair, source, settings, run, Accelerator(cpu=True), config.steps, samples=watch
    )


def _untrained(config: BaseConfig, tokenizer: Any, folder: Path) -> Path:
    """A freshly initialised model and its tokenizer, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.hidden * 8 // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(config.seed)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
