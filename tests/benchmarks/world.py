"""What the benchmarks measure on: a random Llama, a BPE tokenizer made from the data, and memory of
a process of its own.
"""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
# parameters without the embedding and head (Llama), or of the model of that name (Qwen3)
SHAPES = {
    "15M": LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=7, num_attention_heads=6
    ),
    "45M": LlamaConfig(
        hidden_size=640, intermediate_size=1728, num_hidden_layers=8, num_attention_heads=10
    ),
    "0.6B": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "1.7B": Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
}
GPU = torch.cuda.is_available()


def grpo_arguments(folder: Path, **settings: Any) -> Any:
    """TRL's GRPOConfig for plain GRPO at a constant rate, without a KL, reports and checkpoints."""
    from trl import GRPOConfig

    common = {
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "loss_type": "grpo",
        "bf16": False,
        "use_cpu": not GPU,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return GRPOConfig(output_dir=str(folder), **{**common, **settings})


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
        {
            **last,
            "prompt": "\n\n".join(
                [*(f"{row['prompt']}\n{row['chosen']}" for row in earlier), last["prompt"]]
            ),
        }
        for *earlier, last in groups
    ]


def write_world(folder: Path, size: str = "15M", vocab: int = 8192) -> Path:
    """A model with random weights and a byte-level BPE tokenizer trained on the pairs."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((text for row in pairs() for text in row.values()), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return write_model(folder, size, vocab)


def write_model(folder: Path, size: str = "15M", vocab: int = 8192, positions: int = 4096) -> Path:
    """A model of random weights."""
    config = copy.deepcopy(SHAPES[size])
    config.update(
        {"vocab_size": vocab, "max_position_embeddings": positions, "tie_word_embeddings": True}
    )
    config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _status(field: str) -> float:
    """A memory field of this process in MiB. Unlike getrusage's figure, it does not start at the
    parent's size.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_memory() -> float:
    """Largest memory of this process so far, MiB: resident, or allocated on the GPU where there is
    one.
    """
    return torch.cuda.max_memory_allocated() / 2**20 if GPU else _status("VmHWM:")


def clock() -> float:
    """Seconds; what the GPU was given before has been done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def present_memory() -> float:
    """Resident memory of this process now, MiB."""
    return _status("VmRSS:")


def measured_alone(script: str, *arguments: str, frees_at_once: bool = True) -> dict:
    """Run `script` in a process of its own and return the JSON of its last line.

    What it frees goes back to the system at once, so that its memory is what it holds, and not what
    the allocator keeps for later; this costs time, so `frees_at_once` is False where that counts.
    """
    command = [sys.executable, script, *arguments]
    limits = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_") if frees_at_once else ()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(limits, "65536")},
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
