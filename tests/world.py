"""A tiny world for tests: a random Llama of a few thousand parameters, a word tokenizer, rows,
bundles, the command line.
"""

import json
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from alignkit.batches import Bundle
from alignkit.cli.main import main
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.config.train import TrainConfig
from alignkit.policies.load import load_pair
from alignkit.policies.load_scorer import load_scorer
from alignkit.policies.sharding import make_shards
from alignkit.policies.teacher import add_teacher
from alignkit.sources.dataset import DatasetSource
from alignkit.training.job import Job
from alignkit.training.run_folder import RunFolder

VOCAB = 23
# Of `train`: small batches, and nothing that only longer runs need.
SHORT_RUN = {"batch_size": 4, "log_samples_every": 0, "warmup_steps": 0}


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama (2 layers, width 16) with its tokenizer, in Hugging Face layout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
    ).save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, tokenizer_of: Path, seed: int = 0) -> Path:
    """A random reward model (1 layer, width 16) with the tokenizer of another model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, num_labels=1,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


@torch.no_grad()
def pad_vocabulary(folder: Path, rows: int) -> None:
    """Give the model so many further rows of its embedding and head, which it makes unlikely."""
    network = LlamaForCausalLM.from_pretrained(folder)
    # The first channel stays large and positive, so that a head can lower a logit everywhere.
    network.model.embed_tokens.weight[:, 0] = 30.0
    network.lm_head.weight[:, 0] = 0.0
    if rows:
        network.resize_token_embeddings(VOCAB + rows, mean_resizing=False)
        network.lm_head.weight[VOCAB:] = 0.0
        network.lm_head.weight[VOCAB:, 0] = -30.0
    network.save_pretrained(folder)


def write_rows(file: Path, rows: Iterable[Mapping]) -> Path:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair_rows(n: int) -> list[dict[str, str]]:
    """`n` preference pairs (at most 13) in the words of the tokenizer."""
    return [
        {"prompt": f"w{3 + i} w4", "chosen": f"w5 w{6 + i}", "rejected": f"w{7 + i}"}
        for i in range(n)
    ]


def write_inputs(folder: Path) -> None:
    """What a small comparison reads: a model, pairs, prompts and a reward that looks for w5."""
    save_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(6))
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(3, 8)])
    (folder / "worth.py").write_text(
        "def worth(completions, **_):\n    return [float('w5' in text) for text in completions]\n"
    )


def run(*arguments: object) -> int:
    """Exit code of the command line in this process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return left.value.code


def pairs(n: int, seed: int = 0, k: int = 2, **rows) -> list[Bundle]:
    """`n` bundles of `k` random completions of 1 to 7 tokens, holes in some masks."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator)

    bundles = []
    for i in range(n):
        completions = [ids(1, 8) for _ in range(k)]
        masks = [torch.rand(len(c), generator=generator) > 0.2 for c in completions]
        masks = [m if m.any() else torch.ones_like(m) for m in masks]
        extra = {name: make(i) for name, make in rows.items()}
        bundles.append(Bundle(ids(1, 9), completions, masks, f"random:{i + 1}", extra))
    return bundles


def make_job(
    model: Path, out: Path, objective, bundles, *, lora=False, checkpointing=False, budget=4096, evaluation=None,
    accelerator=None, reference="frozen", target=None, layout="shared_prefix", steps=6, **config,
) -> Job:  # fmt: skip
    """A job over `bundles` with small defaults; keyword arguments beyond the named ones are
    TrainConfig's.
    """
    settings = {
        "steps": steps,
        "batch_size": 4,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "save_every": 0,
        "eval_every": 0,
    }
    train = TrainConfig(**{**settings, **config})
    accelerator = accelerator or Accelerator(cpu=True)
    plan = objective.plan
    adapter = AdapterConfig(r=4, alpha=8) if lora and not plan.outputs else None
    model_config = ModelConfig(
        name_or_path=str(model),
        adapter=adapter,
        gradient_checkpointing=checkpointing,
        layout=layout,
    )
    if plan.outputs:
        pair = load_scorer(model_config, plan, device="cpu", seed=train.seed)
    else:
        kind = ReferenceConfig(kind=reference)
        several = train.shard and accelerator.num_processes > 1
        pair = load_pair(
            model_config,
            kind,
            target,
            plan,
            device="cpu",
            fixed_data=True,
            seed=train.seed,
            shards=make_shards("cpu", accelerator.num_processes, train) if several else None,
        )
    if "teacher" in plan.anchors:
        folder = out.parent / f"{out.name}-teacher"
        if accelerator.is_main_process:
            save_model(folder, seed=7)
        accelerator.wait_for_everyone()
        add_teacher(pair, TeacherConfig(name_or_path=str(folder)), model_config)
    source = DatasetSource(
        bundles,
        plan,
        train.batch_size,
        seed=train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    run = RunFolder(out, writes=accelerator.is_main_process)
    identity = {
        "config": train.model_dump(mode="json", exclude={"save_every", "keep", "mesh", "offload"})
    }
    return Job(
        objective,
        pair,
        source,
        train,
        run,
        accelerator,
        steps,
        budget,
        "recipe: test\n",
        identity,
        evaluation=evaluation,
    )
