"""What the benchmarks measure on: a random Llama, a BPE tokenizer made from the data, and memory of a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
SHAPES = {  # parameters without the embedding and head: width, inner width, layers, heads
    "15M": (384, 1024, 7, 6),
    "45M": (640, 1728, 8, 10),
}


def pairs(limit: int | None = None) -> list[dict[str, str]]:
    """GSM8K preference rows in a fixed random order: prompt, chosen, rejected."""
    rows = [json.loads(line) for line in (DATA / "preferences_train.jsonl").open()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [{k: rows[i][k] for k in ("prompt", "chosen", "rejected")} for i in order[:limit]]


def dialogues(limit: int, turns: int = 5) -> list[dict[str, str]]:
    """Pairs whose prompts are long: earlier questions with their answers, then a question."""
    rows = pairs(limit * (turns + 1))
    groups = [rows[i : i + turns + 1] for i in range(0, len(rows), turns + 1)]
    return [
        {**last, "prompt": "\n\n".join([*(f"{row['prompt']}\n{row['chosen']}" for row in earlier), last["prompt"]])}
        for *earlier, last in groups
    ]


def write_world(folder: Path, size: str = "15M", vocab: int = 8192) -> Path:
    """A Llama with random weights and a byte-level BPE tokenizer trained on the pairs."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator((text for row in pairs() for text in row.values()), trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return write_model(folder, size, vocab)


def write_model(folder: Path, size: str = "15M", vocab: int = 8192) -> Path:
    """A Llama with random weights."""
    width, hidden, layers, heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _status(field: str) -> float:
    """A memory field of this process in MiB. Unlike getrusage's figure, it does not start at the parent's size."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_memory() -> float:
    """Largest resident memory of this process so far, MiB."""
    return _status("VmHWM:")


def present_memory() -> float:
    """Resident memory of this process now, MiB."""
    return _status("VmRSS:")


def measured_alone(script: str, *arguments: str) -> dict:
    """Run `script` in a process of its own and return the JSON of its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
