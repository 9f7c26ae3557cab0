"""Run by torchrun in tests: the loop on this many processes; the main one writes weights and
metrics of each case.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import ddp_online_worker
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from online_world import budgeted_job, online_job, share_of_wanted, streams_job, turns_job
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from world import make_job, pad_vocabulary, pairs, save_model

from alignkit.config.model import ModelConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.distributed.launcher import end
from alignkit.errors import AlignkitError, DataError, ResourceError
from alignkit.objectives.distillation.distill import Distill
from alignkit.objectives.distillation.opd import OPD
from alignkit.objectives.online.dph import DPH
from alignkit.objectives.online.fdpg import FDPG
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.kto import KTO
from alignkit.objectives.preference.sft import SFT
from alignkit.objectives.self_play.nash_md import NashMD
from alignkit.objectives.streams import Reweigh
from alignkit.policies.dtensors import full
from alignkit.policies.teacher import add_teacher
from alignkit.policies.teacher_store import release_teacher, with_stored_teacher
from alignkit.training.held_out_reward import HeldOut
from alignkit.training.loop import train

SGD = {"optimizer": "sgd", "learning_rate": 0.5}
BROKEN_STEP = 3
PATIENCE = 1.0  # seconds


def dpo(model, out, accelerator, **settings):
    """6 rows per step of uneven lengths: ranks need different numbers of micro-batches. The second
    has no row to evaluate.
    """
    settings = {
        "evaluation": pairs(1, seed=5) if accelerator.is_main_process else [],
        "eval_every": 2,
        **settings,
    }
    return make_job(
        model,
        out,
        DPO(beta=0.5),
        pairs(20),
        accelerator=accelerator,
        batch_size=6,
        steps=4,
        **settings,
    )


def kto(model, out, accelerator, **settings):
    """Coupled: every row is compared with a baseline over the whole step. The second rank has no
    row to evaluate here either.
    """
    rows = pairs(20, k=1, label=lambda i: torch.tensor([i % 3 > 0]))
    held_out = rows[:1] if accelerator.is_main_process else []
    settings = {"evaluation": held_out, "eval_every": 2, "learning_rate": 0.05, **settings}
    return make_job(
        model, out, KTO(beta=0.5), rows, accelerator=accelerator, batch_size=6, steps=4, **settings
    )


def rpg(model, out, accelerator, **settings):
    """5 prompts per rollout: 3 for the first rank, 2 for the second."""
    return online_job(
        model, out, RPG(beta=0.1), prompts_per_step=5, steps=4, accelerator=accelerator, **settings
    )


def distilled(model, out, accelerator, **settings):
    """A live teacher, and a likelihood of the rows' own answers."""
    return make_job(
        model,
        out,
        Distill(divergence="jsd", kd_ratio=0.7),
        pairs(20, k=1),
        accelerator=accelerator,
        batch_size=6,
        steps=4,
        **settings,
    )


def stored(model, out, accelerator, **settings):
    """As `distilled`, from a teacher's most likely tokens."""
    job = distilled(model, out, accelerator, **settings)
    folder = out.parent / f"{out.name}-teacher"
    teacher = TeacherConfig(name_or_path=str(folder), top=5)
    source = ModelConfig(name_or_path=str(model))
    job.source.bundles = with_stored_teacher(job.pair, job.source.bundles, teacher, source)
    release_teacher(job.pair)
    return job


def adapted(model, out, accelerator, **settings):
    """As `distilled`; the teacher is an adapter's folder."""
    job = distilled(model, out, accelerator, **settings)
    folder = out.parent / f"{out.name}-adapter"
    return taught_by(job, model, folder, lambda: save_adapter(model, folder))


def proposing(model, out, accelerator, **settings):
    """The policy proposes tokens to a teacher whose vocabulary is padded."""
    objective = Distill(share=1.0, teacher_top=4, divergence="reverse_kl")
    job = online_job(model, out, objective, accelerator=accelerator, steps=4, **settings)
    folder = out.parent / f"{out.name}-padded"
    return taught_by(job, model, folder, lambda: pad_vocabulary(save_model(folder, seed=7), 9))


def taught_by(job, model, folder, write):
    """The job with another teacher, which the first process writes."""
    if job.accelerator.is_main_process:
        write()
    job.accelerator.wait_for_everyone()
    if job.pair.shards is not None:
        job.pair.shards.forget(job.pair.anchors["teacher"].module)
    source = ModelConfig(name_or_path=str(model))
    add_teacher(job.pair, TeacherConfig(name_or_path=str(folder)), source)
    return job


def save_adapter(model, folder):
    """A LoRA adapter that changes the model, in peft's layout."""
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(model)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(folder)


def on_policy(model, out, accelerator, **settings):
    """A teacher that reads what the policy samples."""
    return online_job(model, out, OPD(), accelerator=accelerator, steps=4, **settings)


def rehearsed(model, out, accelerator, **settings):
    """Answers that the reference gave once, beside what the policy samples."""
    objective = DPH(weight=0.5, stored=2)
    return online_job(model, out, objective, accelerator=accelerator, steps=4, **settings)


def proposed(model, out, accelerator, **settings):
    """An earlier policy samples, and is renewed after every second step where that is nearer."""
    objective = FDPG(beta=0.1, proposal="adaptive", window=32)
    return online_job(model, out, objective, accelerator=accelerator, steps=4, **settings)


def budgeted(model, out, accelerator, **settings):
    """Sample budgets and rewards of tokens: the ranks draw different numbers of completions beside
    their pilots, one of them perhaps none.
    """
    objective = KLPPO(beta=0.1, value_weight=0.0)
    return budgeted_job(model, out, objective, accelerator=accelerator, steps=4, **settings)


def turns(model, out, accelerator, **settings):
    """Episodes: those of one rank may have ended while the other's go on."""
    return turns_job(model, out, GRPO(), accelerator=accelerator, steps=4, **settings)


def streams(model, out, accelerator, **settings):
    """The last stream of a step has no use for the value head of the first."""
    parts = [
        ("critic", KLPPO(beta=0.1), 0.5),
        ("pairs", DPO(beta=0.5), 0.25),
        ("tuned", SFT(), 0.25),
    ]
    return streams_job(
        model, out, parts, reweigh=Reweigh(window=2), accelerator=accelerator, steps=4, **settings
    )


def dropped(model, out, accelerator, **settings):
    """The reward applies to the first prompt of each rollout alone: the second rank's whole rollout
    is dropped.
    """
    job = rpg(model, out, accelerator, n_prompts=20, **settings)
    kept = set(job.source.order[0:20][::5])

    def first_alone(prompts, completions, **columns):
        scores = share_of_wanted(prompts, completions, **columns)
        return [score if n in kept else None for n, score in zip(columns["n"], scores)]

    job.source.scoring.reward = first_alone
    return job


def measured(model, out, accelerator, **settings):
    job = rpg(model, out, accelerator, eval_every=1, **settings)
    source = job.source
    job.measure = HeldOut(source.prompts, source.sampler, source.scoring, accelerator)
    return job


def nash(model, out, accelerator, **settings):
    return online_job(model, out, NashMD(), accelerator=accelerator, **settings)


CASES = {
    "adamw": (dpo, {"optimizer": "adamw", "save_every": 2}),
    "sgd": (dpo, SGD),
    "tiny_budget": (dpo, {**SGD, "budget": 24}),
    "lora": (dpo, {**SGD, "lora": True, "reference": "adapter_off", "budget": 24}),
    "kto": (kto, {"optimizer": "sgd", "budget": 24}),
    "rpg": (rpg, {"optimizer": "sgd", "learning_rate": 0.1}),
    "dropped": (dropped, {"optimizer": "sgd", "learning_rate": 0.1}),
    "distill": (distilled, {**SGD, "budget": 24}),
    "stored": (stored, {**SGD, "budget": 24}),
    "opd": (on_policy, {"optimizer": "sgd", "learning_rate": 0.1}),
    "dph": (rehearsed, {"optimizer": "sgd", "learning_rate": 0.1}),
    "streams": (streams, {"optimizer": "sgd", "learning_rate": 0.1, "budget": 24}),
    "fsdp_streams": (streams, {"shard": True, "optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_budgets": (
        budgeted,
        {"shard": True, "optimizer": "sgd", "learning_rate": 0.1, "save_every": 2},
    ),
    "fsdp_turns": (turns, {"shard": True, "optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_distill": (distilled, {"shard": True, "budget": 24}),
    "fsdp_adapter_teacher": (adapted, {"shard": True, "budget": 24}),
    "fsdp_proposing": (proposing, {"shard": True, "optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_opd": (on_policy, {"shard": True, "optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_dph": (rehearsed, {"shard": True, "optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_fdpg": (proposed, {"shard": True, "optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_dpo": (dpo, {"shard": True, "save_every": 2}),
    "fsdp_ema": (dpo, {"shard": True, "reference": "ema", "ema_decay": 0.5, "budget": 24}),
    "fsdp_lora": (dpo, {"shard": True, "lora": True, "reference": "adapter_off", "budget": 24}),
    "fsdp_kto": (kto, {"shard": True, "budget": 24}),
    "fsdp_rpg": (rpg, {"shard": True, "save_every": 2}),
}


def a_logit(pair) -> float:
    with pair.model("policy") as network, torch.no_grad():
        return float(network(torch.tensor([[3, 4, 5]])).logits[0, -1, 6])


def run(case: str, model: Path, out: Path, resume: str | None = None) -> None:
    """One case in `out/case`; `out/case.safetensors` are its final weights."""
    make, settings = CASES[case]
    run_case(case, make, settings, model, out, resume)


def run_case(case: str, make, settings, model: Path, out: Path, resume: str | None = None) -> None:
    """One run in `out/case`, and its final weights."""
    accelerator = Accelerator(cpu=True)
    job = make(model, out / case, accelerator, **settings)
    # on the first process alone
    job.samples = lambda step: [{"step": step, "logit": a_logit(job.pair)}]
    with job.run:
        train(job, resume)
    shards = [isinstance(p, DTensor) for p in job.pair.parameters()]
    assert set(shards) == {job.config.shard and accelerator.num_processes > 1}
    weights = {name: full(tensor) for name, tensor in job.pair.state().items()}
    if accelerator.is_main_process:
        save_file(weights, out / f"{case}.safetensors")


def take_up(case: str, source: Path, out: Path) -> None:
    """`out/case` with nothing but the second step's checkpoint of `source/case`, and the metrics up
    to there.
    """
    shutil.copytree(source / case / "checkpoints" / "step-2", out / case / "checkpoints" / "step-2")
    shutil.copy(source / case / "metrics.jsonl", out / case / "metrics.jsonl")


def failing(call, error, at=BROKEN_STEP):
    """`call`, whose call number `at` raises."""
    calls = count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == at:
            raise error
        return call(*args, **kwargs)

    return wrapped


def a_log_prob(job):
    collect, logps = job.source.collect, job.pair.logps
    now = {}

    def spoilt(bundles, plan, **options):
        tokens = logps(bundles, plan, **options)
        if now["step"] == BROKEN_STEP - 1:
            tokens.policy.data[0, 0] = torch.nan
        return tokens

    job.source.collect = lambda step, half: (now.update(step=step), collect(step, half))[1]
    job.pair.logps = spoilt


def the_reward(job):
    job.source.scoring.reward = failing(
        job.source.scoring.reward, DataError("reward mine raised KeyError: 1")
    )


def the_judge(job):
    job.source.scoring.judge = failing(
        job.source.scoring.judge, ResourceError("judge mine did not return within 0.3 s")
    )


def the_held_out_reward(job):
    scoring = job.measure.scoring
    failed = failing(scoring.reward, DataError("reward mine raised KeyError: 1"))
    job.measure = replace(job.measure, scoring=replace(scoring, reward=failed))


def ones_own_code(job):
    job.source.scoring.reward = failing(job.source.scoring.reward, ZeroDivisionError("mine"))


def the_memory(job):
    job.source.sampler.sample = failing(
        job.source.sampler.sample, torch.OutOfMemoryError("CUDA out of memory")
    )


def the_disk(job):
    checkpoints = job.run.checkpoints
    job.run.log = lambda row: (
        setattr(job.run, "checkpoints", checkpoints / "a file")
        if row["step"] == BROKEN_STEP
        else None
    )
    checkpoints.mkdir(parents=True)
    (checkpoints / "a file").touch()


def the_log(job):
    job.run.log = failing(
        job.run.log, ResourceError("cannot write metrics.jsonl: No space left on device")
    )


BREAKS = {  # what breaks in step 3: on which rank, in which run, exit code and words
    "a_log_prob": (1, dpo, {}, 5, "rank 1: log-probs of `policy` are not finite at row random:"),
    "the_reward": (1, rpg, {}, 3, "reward mine raised KeyError: 1"),
    "the_judge": (1, nash, {}, 7, "judge mine did not return within 0.3 s"),
    "the_held_out_reward": (1, measured, {}, 3, "reward mine raised KeyError: 1"),
    "ones_own_code": (1, rpg, {}, 1, "mine"),
    "the_memory": (1, rpg, {}, 7, "step 3: out of memory while sampling or scoring"),
    "the_disk": (0, dpo, {}, 6, "could not write checkpoint step-3"),
    "the_log": (0, dpo, {}, 7, "cannot write metrics.jsonl: No space left on device"),
}


def train_and_tell(job, out: Path) -> None:
    """Every rank writes how the run ended for it: exit code and message."""
    try:
        with job.run:
            train(job)
    except (AlignkitError, ZeroDivisionError) as error:
        told = [getattr(error, "exit_code", 1), str(error)]
        (out / f"{job.run.path.name}-{job.accelerator.process_index}.json").write_text(
            json.dumps(told)
        )


def a_signal(model: Path, out: Path) -> None:
    """In its third step the last rank is asked to stop."""
    accelerator = Accelerator(cpu=True)
    job = dpo(model, out / "a_signal", accelerator)
    if accelerator.process_index == accelerator.num_processes - 1:
        collect = job.source.collect

        def signalled(step, half):
            if step == BROKEN_STEP - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return collect(step, half)

        job.source.collect = signalled
    train_and_tell(job, out)


def break_one_rank(name: str, model: Path, out: Path) -> None:
    """A run in which something breaks on one rank only."""
    accelerator = Accelerator(cpu=True)
    rank, make, settings, *_ = BREAKS[name]
    job = make(model, out / name, accelerator, **{"save_every": 1, "evaluation": None, **settings})
    if accelerator.process_index == rank:
        globals()[name](job)
    train_and_tell(job, out)


def a_slow_rank(model: Path, out: Path) -> None:
    """In its third step the last rank takes longer than the others wait. Nothing works after."""
    # as train.process_timeout gives it
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    job = rpg(model, out / "a_slow_rank", accelerator, save_every=1)
    if accelerator.process_index == 1:
        reward, calls = job.source.scoring.reward, count(1)

        def slow(*args, **columns):
            time.sleep(3 * PATIENCE if next(calls) == BROKEN_STEP else 0)
            return reward(*args, **columns)

        job.source.scoring.reward = slow
    train_and_tell(job, out)


if __name__ == "__main__":
    model, one, out = map(Path, sys.argv[1:])
    for case in CASES:
        run(case, model, out)
    for name in BREAKS:
        break_one_rank(name, model, out)
    a_signal(model, out)
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        take_up("adamw", one, out / "more")
    accelerator.wait_for_everyone()
    run("adamw", model, out / "more", "auto")
    ddp_online_worker.main(model, out / "online", accelerator)
    a_slow_rank(model, out)
    end(accelerator)
