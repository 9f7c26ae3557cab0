"""What a process holds of a sharded model's parameters, as a Markdown table: from the first byte
that is read to the saved model.

    python tests/benchmarks/bench_shards.py [--processes 4]

Counted is the memory of each process that no file stands behind (RssAnon, every 2 ms), above what it
held before the model was loaded. glibc is told to give large blocks back as soon as they are freed:
left to itself it keeps them, and grows to several times what is in use. Allowed is 1.3 / N of the model plus the largest unit of
`fully_shard`, which is put together for its own computation. Gradients and the optimiser's moments
are not in it: nothing is trained.
"""

import argparse
import os
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.batches import Bundle
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.objectives.preference.sft import SFT
from alignkit.policies.load import load_pair
from alignkit.policies.sharding import Shards, make_mesh

MIB = 2**20


def make_model(folder: Path) -> None:
    """A random Llama of a little over 400 MiB in float32, with a tokenizer of its numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=13,
        num_attention_heads=12,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(8192)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0").save_pretrained(
        folder
    )


def held() -> float:
    """Memory of this process that no file stands behind, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux")


@contextmanager
def peak(figures: dict[str, float], name: str, base: float):
    """The most that is held inside the block above `base`, as figures[name]."""
    most, done = held(), threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, held())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        figures[name] = max(most, held()) - base


def bundle(length: int = 32) -> Bundle:
    """One row of random tokens."""
    tokens = torch.randint(2, 8192, (length,), generator=torch.Generator().manual_seed(0))
    prompt, completion = tokens[:8], tokens[8:]
    return Bundle(prompt, [completion], [torch.ones(len(completion), dtype=torch.bool)])


def worker(rank: int, processes: int, folder: str, out: str) -> None:
    """One process: load, score, save, and print what was held."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29631", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )(torch.zeros(1, 4, dtype=torch.int64))  # what code alone takes is there before the model is

    figures: dict[str, float] = {}
    base = held()
    plan = SFT().plan
    with peak(figures, "load", base):
        pair = load_pair(
            ModelConfig(name_or_path=folder),
            ReferenceConfig(),
            None,
            plan,
            fixed_data=True,
            shards=Shards(make_mesh("cpu", processes, None)),
        )
    with peak(figures, "score", base), torch.no_grad():
        for _ in range(2):
            pair.logps([bundle()], plan)
    with peak(figures, "save", base):
        pair.save(out, writes=rank == 0)
        dist.barrier()

    # Every parameter once, with the unit that gathers it: the innermost one around it.
    units: dict[str, int] = {}
    whole = 0
    gathering = {name for name, m in pair.base.named_modules() if isinstance(m, FSDPModule)}
    for name, parameter in pair.base.named_parameters():
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        unit = next((p for p in parents if p in gathering), "")
        size = parameter.numel() * parameter.element_size()
        units[unit] = units.get(unit, 0) + size
        whole += size

    results: list = [None] * processes
    dist.all_gather_object(results, figures)
    if rank == 0:
        block = max(units.values()) / MIB
        allowed = 1.3 / processes * whole / MIB + block
        print(
            f"{processes} processes, a model of {whole / MIB:.0f} MiB, largest unit {block:.0f} MiB, "
            f"allowed {allowed:.0f} MiB\n\n| during | most that a process held, MiB |\n|---|---|"
        )
        for name in figures:
            print(f"| {name} | {max(result[name] for result in results):.0f} |")
    dist.destroy_process_group()


def main() -> None:
    """Make the model and measure."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--processes", type=int, default=4)
    asked = options.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # read by the processes when they start
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make_model(folder)
        (Path(place) / "saved").mkdir()
        torch.multiprocessing.spawn(
            worker,
            (asked.processes, str(folder), str(Path(place) / "saved")),
            nprocs=asked.processes,
        )


if __name__ == "__main__":
    main()
