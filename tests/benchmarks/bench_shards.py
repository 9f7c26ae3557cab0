"""What a process holds of a sharded model's parameters, as a Markdown table: from the first byte
that is read to the saved model.

    python tests/benchmarks/bench_shards.py [--processes 4]

Counted are, in two runs and above what was held before the model was loaded, the bytes that torch's
allocator gave and has not got back, and the memory of each process that no file stands behind
(RssAnon, every 2 ms), in which Python's objects and the kernels' own memory are too. glibc is told
to give large blocks back as soon as they are freed: left to itself it keeps them, and grows to
several times what is in use. Allowed is 1.3 / N of the model plus the largest unit of
`fully_shard`, which is put together for its own computation. Gradients and the optimiser's moments
are not in it: nothing is trained.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.batches import Bundle
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig
from alignkit.objectives.preference.sft import SFT
from alignkit.policies.load import load_pair
from alignkit.policies.pair import PolicyPair
from alignkit.policies.sharding import make_shards

MIB = 2**20


def make_model(folder: Path, width: int = 768, layers: int = 13) -> None:
    """A random Llama in float32, by default of 399 MiB, with a tokenizer of its numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
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


class Watch:
    """What this process holds at most while something is done, above what it held before, in MiB."""

    def __init__(self, what: str, ignored: int) -> None:
        self.base = held()
        self.measured = {"allocated": self.allocated, "resident": self.resident}[what]
        self.ignored = ignored  # bytes of the mapping of a file, which torch counts too
        self.alive = 0  # bytes of the allocator
        self.figures: dict[str, float] = {}

    @contextmanager
    def during(self, name: str):
        """Inside the block `figures[name]` is measured."""
        with self.measured() as found:
            yield
        self.figures[name] = found[0]

    @contextmanager
    def resident(self):
        """Memory that no file stands behind."""
        most, done = held(), threading.Event()

        def watch():
            nonlocal most
            while not done.is_set():
                most = max(most, held())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        found: list[float] = []
        try:
            yield found
        finally:
            done.set()
            watcher.join()
            found.append(max(most, held()) - self.base)

    @contextmanager
    def allocated(self):
        """What torch's allocator gave and has not got back."""
        found: list[float] = []
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            yield found
        events = profiled.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        most = self.alive
        for _, size in sorted(changes, key=lambda change: change[0]):
            self.alive += size if abs(size) != self.ignored else 0
            most = max(most, self.alive)
        found.append(most / MIB)


def bundle(length: int = 32) -> Bundle:
    """One row of random tokens."""
    tokens = torch.randint(2, 8192, (length,), generator=torch.Generator().manual_seed(0))
    prompt, completion = tokens[:8], tokens[8:]
    return Bundle(prompt, [completion], [torch.ones(len(completion), dtype=torch.bool)])


def loaded(folder: str, processes: int) -> PolicyPair:
    """The model in shards."""
    return load_pair(
        ModelConfig(name_or_path=folder),
        ReferenceConfig(),
        None,
        SFT().plan,
        fixed_data=True,
        shards=make_shards("cpu", processes, TrainConfig(shard=True)),
    )


def worker(rank: int, processes: int, folder: str, out: str, what: str) -> None:
    """One process: load, score, save, and write what was held."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29631", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    plan = SFT().plan

    # What code alone takes is there before the model: modules, and the kernels' own memory.
    small = loaded(f"{folder}-small", processes)
    with torch.no_grad():
        small.logps([bundle()], plan)
        torch.nn.functional.linear(torch.zeros(64, 768), torch.zeros(2048, 768))

    file = Path(folder) / "model.safetensors"
    watch = Watch(what, file.stat().st_size)
    with watch.during("load"):
        pair = loaded(folder, processes)
    with watch.during("score"), torch.no_grad():
        for _ in range(2):
            pair.logps([bundle()], plan)
    with watch.during("save"):
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
    dist.all_gather_object(results, watch.figures)
    if rank == 0:
        block = max(units.values()) / MIB
        allowed = 1.3 / processes * whole / MIB + block
        sizes = {"processes": processes, "model": whole / MIB, "unit": block, "allowed": allowed}
        most = {name: max(result[name] for result in results) for name in watch.figures}
        Path(out, "figures.json").write_text(json.dumps({**sizes, **most}))
    dist.destroy_process_group()


def measured(processes: int, what: str) -> dict[str, float]:
    """The sizes, and what was held in each phase, in MiB."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "model", Path(place) / "saved"
        make_model(folder)
        make_model(Path(f"{folder}-small"), width=24, layers=1)
        out.mkdir()
        torch.multiprocessing.spawn(
            worker, (processes, str(folder), str(out), what), nprocs=processes
        )
        return json.loads((out / "figures.json").read_text())


def main() -> None:
    """Measure in both ways, or write the figures of one."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--processes", type=int, default=4)
    options.add_argument("--allocated", type=Path, help="write these figures alone, as JSON")
    asked = options.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # read by the processes when they start
    if asked.allocated:
        asked.allocated.write_text(json.dumps(measured(asked.processes, "allocated")))
        return
    print(table({what: measured(asked.processes, what) for what in ("allocated", "resident")}))


def table(columns: dict[str, dict[str, float]]) -> str:
    """The sizes, and what was held in each phase by either way of counting."""
    sizes = columns["resident"]
    lines = [
        f"{sizes['processes']} processes, a model of {sizes['model']:.0f} MiB, largest unit "
        f"{sizes['unit']:.0f} MiB, allowed {sizes['allowed']:.0f} MiB",
        "",
        "| most that a process held, MiB, during | by torch's allocator | resident |",
        "|---|---|---|",
    ]
    for name in ("load", "score", "save"):
        allocated, resident = (columns[what][name] for what in ("allocated", "resident"))
        lines.append(f"| {name} | {allocated:.0f} | {resident:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
