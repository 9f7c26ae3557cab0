"""DPO: alignkit beside TRL, step by step in turn, in one process; peak memory in a process of each.

    python tests/benchmarks/bench_dpo.py [--data gsm8k] [--steps 12] [--size 15M] [--vocab 8192]
    [--dtype float32] ...

Both sides train the same weights on the same batches with a live reference. TRL runs with gradient
checkpointing on and off, in whole batches and in quarters that are accumulated. The floor of a step
are the matrix products on the tokens that differ (in the last layer, on those that the head reads),
of policy and reference, forward and backward, timed on the machine in between. The tables go to
stdout as Markdown. On a GPU the defaults are a Qwen3 of 0.6B in bfloat16 and flex attention.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from world import GPU, SHAPES, clock, dialogues, measured_alone, pairs, peak_memory, write_world

from alignkit.policies.layout import build_rows

BETA, RATE = 0.1, 1e-5
LONGEST = 2048  # tokens of prompt and completion
DATA_SETS = {"gsm8k": pairs, "dialogues": dialogues}


class Ours:
    """alignkit's step: the loop's own reducer, optimiser and update."""

    def __init__(
        self,
        folder: Path,
        rows: list[dict],
        batch: int,
        dtype: str,
        objective=None,
        attention: str = "auto",
        checkpointing: bool = False,
    ):
        from alignkit.config.data import DataConfig
        from alignkit.config.model import ModelConfig, ReferenceConfig
        from alignkit.config.train import TrainConfig
        from alignkit.data import load_bundles
        from alignkit.objectives.preference.dpo import DPO
        from alignkit.policies.load import load_pair
        from alignkit.policies.packing import default_budget
        from alignkit.training.optimizer import make_optimizer
        from alignkit.training.reduction import Reducer

        objective = objective or DPO(beta=BETA)
        accelerator = Accelerator(
            cpu=not GPU, mixed_precision="bf16" if dtype == "bfloat16" else "no"
        )
        model = ModelConfig(
            name_or_path=str(folder), attention=attention, gradient_checkpointing=checkpointing
        )
        self.pair = load_pair(
            model,
            ReferenceConfig(kind="frozen"),
            None,
            objective.plan,
            device=accelerator.device,
            fixed_data=True,
        )
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        bundles, _ = load_bundles(
            DataConfig(train=str(file), max_length=LONGEST), "pair", self.pair.tokenizer
        )
        self.batches = [bundles[i : i + batch] for i in range(0, len(bundles), batch)]
        config = TrainConfig(learning_rate=RATE)
        self.optimizer = self.pair.prepare(accelerator, partial(make_optimizer, config))
        budget = default_budget(accelerator.device, self.pair.packing)
        self.reducer = Reducer(objective, self.pair, accelerator, budget, 1.0)
        self.dtype = getattr(torch, dtype)

    def step(self, index: int) -> float:
        metrics = self.reducer.backward(self.batches[index])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics["loss"]

    def floor(self, index: int) -> float:
        """Seconds of the matrix products of a step on its distinct tokens, each shape timed now."""
        rows = build_rows(self.batches[index], "shared_prefix")
        own = torch.arange(rows.input_ids.shape[1])
        # pads have the id 0 and see themselves alone
        tokens = int(((rows.ends > own + 1) | (rows.input_ids > 0)).sum())
        head = self.pair.base.head.module
        # After the last layer's keys and values only the states that the head reads are needed.
        last = {
            id(module)
            for name, module in self.pair.base.model.model.layers[-1].named_modules()
            if not name.endswith(("k_proj", "v_proj"))
        }
        read = len(rows.sources.unique())
        shapes: dict[tuple[int, int, int], int] = {}
        for module in self.pair.base.modules():
            if isinstance(module, torch.nn.Linear):
                count = read if id(module) in last else tokens
                shape = (len(rows.labels) if module is head else count, *module.weight.shape)
                shapes[shape] = shapes.get(shape, 0) + 1
        return sum(count * self._products(*shape) for shape, count in shapes.items())

    @torch.no_grad()
    def _products(self, rows: int, outputs: int, inputs: int) -> float:
        shapes, device = ((rows, inputs), (outputs, inputs), (rows, outputs)), self.pair.device
        x, w, g = (torch.ones(shape, dtype=self.dtype, device=device) for shape in shapes)
        # policy, reference, two of backward
        acts = (
            lambda: x @ w.T,
            lambda: x @ w.T,
            lambda: g @ w,
            lambda: g.T @ x,
        )
        for act in acts:
            act()
        began = clock()
        for act in acts:
            act()
        return clock() - began


@dataclass(frozen=True)
class Setting:
    """How TRL is run."""

    checkpointing: bool
    accumulation: int
    liger: bool = False

    def __str__(self) -> str:
        parts = f"{'checkpointing' if self.checkpointing else 'no checkpointing'}, {8 // self.accumulation} x {self.accumulation}"
        return f"{parts}, Liger" if self.liger else parts


# alignkit's own memory is measured with and without checkpointing, its speed without.
OWN = {"alignkit": False, "alignkit, checkpointing": True}
KERNELS = (False, True) if GPU and find_spec("liger_kernel") else (False,)
SETTINGS = [
    Setting(on, parts, liger) for liger in KERNELS for on in (False, True) for parts in (1, 4)
]


def trl_trainer(folder: Path, rows: list[dict], setting: Setting, dtype: str, steps: int, callback):
    """TRL's trainer on the same weights and batches."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    disable_progress_bar()
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=8 // setting.accumulation,
        gradient_accumulation_steps=setting.accumulation,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=LONGEST,
        gradient_checkpointing=setting.checkpointing,
        use_liger_kernel=setting.liger,
        train_sampling_strategy="sequential",
        bf16=dtype == "bfloat16",
        use_cpu=not GPU,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(
        model,
        reference,
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # the table alone goes to stdout
    return trainer


def callback_between_steps(act):
    """A trainer callback that calls `act(seconds of the step just done, its loss)`; the act's own
    time is not TRL's.
    """
    from transformers import TrainerCallback

    class Between(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_, **__):
            self.began = clock()

        def on_step_end(self, *_, **__):
            act(clock() - self.began)
            self.began = clock()

    return Between()


def alternate(
    folder: Path, rows: list[dict], given: argparse.Namespace, setting: Setting
) -> dict[str, float]:
    """Medians of a step of alignkit, of TRL and of the floor, in turn, and the largest difference
    of the losses.
    """
    ours, theirs, floors, losses = [], [], [], []
    side = Ours(folder, rows, 8, given.dtype, attention=given.attention)

    def act(seconds: float) -> None:
        theirs.append(seconds)
        began = clock()
        losses.append(side.step(len(ours)))
        ours.append(clock() - began)
        floors.append(side.floor(len(floors)))

    trainer = trl_trainer(
        folder, rows, setting, given.dtype, given.steps, callback_between_steps(act)
    )
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    medians = {
        name: statistics.median(times[1:])
        for name, times in (("ours", ours), ("theirs", theirs), ("floor", floors))
    }
    return medians | {"difference": max(abs(a - b) for a, b in zip(losses, logged, strict=True))}


def alone(folder: Path, rows: list[dict], given: argparse.Namespace) -> None:
    """Peak memory of one side, printed as JSON."""
    if given.alone in OWN:
        side = Ours(
            folder,
            rows,
            8,
            given.dtype,
            attention=given.attention,
            checkpointing=OWN[given.alone],
        )
        for i in range(given.steps):
            side.step(i)
    else:
        setting = next(setting for setting in SETTINGS if str(setting) == given.alone)
        trl_trainer(
            folder, rows, setting, given.dtype, given.steps, callback_between_steps(lambda _: None)
        ).train()
    print(json.dumps({"memory": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="gsm8k", choices=DATA_SETS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", default="0.6B" if GPU else "15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=151_936 if GPU else 8192)
    parser.add_argument(
        "--dtype", default="bfloat16" if GPU else "float32", choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--attention", default="flex_attention" if GPU else "auto", help="alignkit's kernel"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[str(setting) for setting in SETTINGS],
        choices=[str(setting) for setting in SETTINGS],
        help="of TRL",
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    rows = DATA_SETS[given.data](8 * given.steps)
    if given.alone:
        alone(Path(given.folder), rows, given)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = write_world(Path(name), given.size, given.vocab)
        report(folder, rows, given)


def report(folder: Path, rows: list[dict], given: argparse.Namespace) -> None:
    """Run everything and print the table."""
    common = (
        "--folder",
        str(folder),
        "--steps",
        str(min(given.steps, 4)),
        "--dtype",
        given.dtype,
        "--data",
        given.data,
    )
    common += ("--attention", given.attention)
    machine = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads"
    mine, checkpointed = (
        measured_alone(__file__, "--alone", own, *common)["memory"] for own in OWN
    )
    print(
        f"\nDPO, {given.data}, batch 8, {given.size}, vocabulary {given.vocab}, {given.dtype}, live reference, "
        f"{machine}, medians of {given.steps - 1} steps; alignkit's peak memory {mine:.0f} MiB, "
        f"with checkpointing {checkpointed:.0f}\n"
    )
    print(
        "| TRL with | alignkit pairs/s | TRL pairs/s | ratio | TRL MiB | alignkit's share | with its checkpointing | "
        "floor / step | loss difference |"
    )
    print("|---" * 9 + "|")
    for setting in SETTINGS:
        if str(setting) not in given.settings:
            continue
        found = alternate(folder, rows, given, setting)
        memory = measured_alone(__file__, "--alone", str(setting), *common)["memory"]
        print(
            f"| {setting} | {8 / found['ours']:.2f} | {8 / found['theirs']:.2f} | {found['theirs'] / found['ours']:.2f} | "
            f"{memory:.0f} | {mine / memory:.2f} | {checkpointed / memory:.2f} | {found['floor'] / found['ours']:.2f} | {found['difference']:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
