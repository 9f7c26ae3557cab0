"""Base models of the embedded tasks: a tokenizer of words or characters and a small Llama, trained
from scratch by `sft`.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from alignkit.config.data import DataConfig
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig
from alignkit.data.load import load_bundles
from alignkit.objectives.preference.sft import SFT
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair
from alignkit.sources.dataset import DatasetSource
from alignkit.tasks.definition import BaseConfig
from alignkit.training.job import Job
from alignkit.training.loop import train
from alignkit.training.run_folder import RunFolder

EOS = "<eos>"
UNKNOWN = "<unk>"
WATCH_EVERY = 5  # steps between two looks at a base model that is to be stopped early

Enough = Callable[[PolicyPair], bool]  # whether a base model has learned enough


class _StopTraining(Exception):
    """Ends the training of a base model that has learned enough."""


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose tokens are the words of texts, split at white space, after EOS and
    UNKNOWN (ids 0 and 1).

    EOS is the one special token (it pads too), so that decoding hides nothing else that a model
    writes.
    """
    tokenizer = Tokenizer(_vocabulary(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def character_tokenizer(characters: Sequence[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose tokens are single characters, after EOS and UNKNOWN (ids 0 and 1)."""
    tokenizer = Tokenizer(_vocabulary(characters))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def _vocabulary(tokens: Sequence[str]) -> models.WordLevel:
    ids = {token: i for i, token in enumerate((EOS, UNKNOWN, *tokens))}
    return models.WordLevel(ids, unk_token=UNKNOWN)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=EOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def train_base(
    config: BaseConfig,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    folder: Path,
    enough: Enough | None = None,
) -> Path:
    """Train a Llama on `rows` (prompt, completion) with alignkit's own
    loop; `folder`/model is what `from_pretrained` loads.

    `enough` is asked with the policy pair every few steps; training ends where it says True, or
    after `config.steps`.
    """
    start = _untrained(config, tokenizer, folder / "untrained")
    train_further(config, rows, start, folder, enough)
    shutil.rmtree(start)
    return folder / "model"


def train_further(
    config: BaseConfig,
    rows: Sequence[Mapping[str, str]],
    start: Path,
    folder: Path,
    enough: Enough | None = None,
) -> None:
    """Train the model in `start` on `rows` and save it as `folder`/model; see `train_base`."""
    with RunFolder(folder / "run") as run, suppress(_StopTraining):
        job = _job(config, rows, start, run, enough)
        train(job)
    job.pair.save(folder / "model")
    shutil.rmtree(run.path)


def _untrained(config: BaseConfig, tokenizer: Any, folder: Path) -> Path:
    """A freshly initialised model and its tokenizer, saved."""
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


def _job(
    config: BaseConfig,
    rows: Sequence[Mapping[str, str]],
    start: Path,
    run: RunFolder,
    enough: Enough | None,
) -> Job:
    """Supervised fine-tuning of the model in `start`, which `enough` may end."""
    objective = SFT()
    model = ModelConfig(name_or_path=str(start))
    pair = load_pair(model, ReferenceConfig(), None, objective.plan, device="cpu", fixed_data=True)
    bundles, _ = load_bundles(DataConfig(), "sequence", pair.tokenizer, source=rows)
    source = DatasetSource(bundles, objective.plan, config.batch_size, seed=config.seed)
    settings = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        eval_every=0,
        save_every=0,
        log_samples_every=WATCH_EVERY if enough else 0,
    )

    # The loop asks for samples regularly: a good moment to look at the model.
    def watch(step: int) -> list[dict[str, Any]]:
        if step and enough is not None and enough(pair):
            raise _StopTraining
        return []

    return Job(
        objective, pair, source, settings, run, Accelerator(cpu=True), config.steps, samples=watch
    )
