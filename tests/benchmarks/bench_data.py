"""What many rows cost: `alignkit data check` twice, and the start of a DPO run on them.

    python tests/benchmarks/bench_data.py [--rows 100000] [--store FOLDER]

The pairs of ../shared/data, repeated with changed texts, and the story model's tokenizer. The cache is
a new folder. Seconds, processor seconds and peak memory are those of whole commands, imports
included; the first row of the table is the run on 100 pairs. It goes to stdout as Markdown.

With `--store`, the runs have `reference.store` there, and the first one fills it, unless an earlier
call did. As all pairs go through the model for that, it is a small one: one layer of width 16, random,
with the same tokenizer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = DATA / "stories260k"
SETTINGS = [
    f"model.name_or_path={MODEL}",
    "train.steps=1",
    "train.batch_size=4",
    "train.eval_every=0",
    "train.save_every=0",
    "train.log_samples_every=0",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--store", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    number = arguments.rows
    store = arguments.store

    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {number:,} pairs\n")
    print("| command | s | CPU s | peak MiB |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ALIGNKIT_CACHE"] = str(folder / "cache")
        few = write(folder / "few.jsonl", 100)
        many = write(folder / "many.jsonl", number)
        if store is not None:
            measure_store(folder, few, many, store.absolute())
            return
        checking = ["data", "check", str(many), "--model", str(MODEL), "--family", "pair"]
        frozen = "reference.kind=frozen"

        measure("dpo, 100 pairs", train(folder / "a", few, frozen))
        measure("data check", checking)
        measure("data check again", checking)
        measure("dpo, frozen reference", train(folder / "b", many, frozen))


def measure_store(folder: Path, few: Path, many: Path, store: Path) -> None:
    """The rows of runs that keep the reference's log-probs in `store`."""
    # Elsewhere: a process that is started counts its parent's memory as its own peak.
    maker = get_context("spawn").Process(target=save_small_model, args=(folder / "model",))
    maker.start()
    maker.join()
    small = f"model.name_or_path={folder / 'model'}"
    is_new = not any(store.glob("*.safetensors"))
    filled = [f"reference.store={store}", small]

    measure("dpo, 100 pairs, small model", train(folder / "a", few, small))
    if is_new:
        measure("dpo, fills the store", train(folder / "b", many, *filled))
    else:
        checking = ["data", "check", str(many), "--model", str(folder / "model")]
        measure("data check", [*checking, "--family", "pair"])
    measure("dpo, filled store", train(folder / "c", many, *filled))


def save_small_model(folder: Path) -> None:
    """The same bits each time."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(path: Path, number: int) -> Path:
    """So many pairs, no two of them equal."""
    lines = (DATA / "stories_sentiment" / "preferences_train.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    with path.open("w") as file:
        for i in range(number):
            pair = pairs[i % len(pairs)]
            row = {key: f"{pair[key]} {i}" for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": pair["prompt"], **row}) + "\n")
    return path


def train(run: Path, rows: Path, *options: str) -> list[str]:
    """The arguments of a run of one step."""
    return ["train", "dpo", f"output_dir={run}", f"data.train={rows}", *SETTINGS, *options]


def measure(name: str, arguments: list[str]) -> None:
    """Run `alignkit` and print a row of the table."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "alignkit", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{name}: alignkit ended with status {status}")
    busy = usage.ru_utime + usage.ru_stime
    print(f"| {name} | {seconds:.1f} | {busy:.1f} | {usage.ru_maxrss / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
