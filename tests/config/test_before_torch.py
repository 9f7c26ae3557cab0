"""What is wrong with a recipe by itself is said before torch is imported, which takes seconds."""

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from alignkit.config.objective_fields import TABLE, annotation, fields_of
from alignkit.config.text import Origin
from alignkit.config.validation import validated
from alignkit.errors import ConfigError
from alignkit.objectives import OBJECTIVES, locate

# The words of a command -> part of its message.
TYPOS = {
    "train dpo objectiv.beta=1": "not a section of a recipe. Did you mean `objective`?",
    "train dpo train.stepz=1": "Did you mean `steps`?",
    "train dpo objective.bta=1": "Did you mean `beta`?",
    "train dpo objective.beta=x": "it should be a number",
    "train dpo objective.beta=-1": "greater than 0",
    "train dpo objective.name=dpoo": "Did you mean `dpo`?",
    "train dpo objective=[{'name':dpo},{'name':sft,'fomr':dft}]": "Did you mean `form`?",
    "train dpo objective=[{'name':dpo},{'name':sft,'weight':0}]": "greater than 0",
    "train dpo objective={'import':nope.py:Mine}": "there is no file",
    "train dpo objective={'import':nope:Mine}": "neither a module `nope`",
    "train rpg rewards=[{'function':nope.py:score}]": "rewards.0.function: there is no file",
    "train dpo train.callbacks=[nope.py:Mine]": "train.callbacks: there is no file",
    "train dpo model.name_or_path=./nope": "there is no folder ./nope",
    "train dpo data.train=nope.jsonl": "no file or folder nope.jsonl",
    "train dpo train.optimizer=adamm": "Did you mean `adamw`?",
    "train dpo data.chat_template=nope.jinja": "nope.jinja is neither a Jinja template nor a file",
    "train dpo model.name_or_path=run": "the folder run holds no config.json; give run/model",
    "train dpo trackers=[swanlab]": "swanlab is not installed; install it or leave it out",
    "train rpg rollout.temperature=0": "greater than 0",
    "train rpg rollout.transfer=nccl": "there is no url; leave it out",
    "train raft train.shard=true rollout.allocate={'norm':head}": "reads the head as a whole",
    "train dpo model.quantize=8bit": "quantize 8bit",  # needs a package, or an adapter
    "train dpo model.adapter.peft={'peft_type':LOHAA}": "Did you mean `LOHA`?",
    "train dpo model.adapter.peft={'use_dorra':true}": "Did you mean `use_dora`?",
    "train dpo model.adapter.peft={'peft_type':LOHA,'use_dora':true}": "LoHaConfig of the installed",
    "train dpo data.train=rows.jsonl": "try data.columns.prompt=question data.columns.chosen=better",
    "train kto data.train=late.jsonl": "the columns are prompt, answer; needed are labelled",
    "train rpg data.train=rows.jsonl": "needed are prompts: a column prompt",
    "train dpo data.train=pairs.jsonl data.eval=rows.jsonl": "rows.jsonl: the columns are question",
    "train fdpo objective.divergence=jefreys": "Did you mean `jeffreys`? Allowed: reverse_kl",
    "train dpo output_dir=run": "already holds a run; continue it with --resume auto",
    "train dpo output_dir=mine": "is not the folder of a run, and it holds notes.txt",
    "train dpo output_dir=mine.py": "mine.py is a file; choose an empty or new folder",
    "train dpo --resume run/checkpoints/step-7": "no checkpoint folder run/checkpoints/step-7",
    "train dpo train.metric=eval_far_loss data.eval={'near':mine.py}": "which is of no set of",
    "train dpo model.adapter.path=./nope": "no adapter_config.json in ./nope",
    "train rpg rewards=[{'verifier':nope.py:score}]": "rewards.0.verifier: there is no file",
    "train rpg rewards=[{'function':mine.py:scroe}]": "Did you mean `score`? It has: score, LIMIT",
    "train rpg rewards=[{'model':./nope}]": "rewards.0.model: there is no folder ./nope",
    "train rpg rewards=[{'ensemble':[./nope,./nor]}]": "rewards.0.ensemble: there is no folder",
    "train nash_md judge={'function':nope.py:better}": "judge.function: there is no file",
    "train nash_md judge={'trl':nope:Better}": "judge.trl: found neither a module `nope`",
    "train nash_md judge={'model':./nope}": "judge.model: there is no folder ./nope",
    "train grpo rollout.environment=nope.py:World": "rollout.environment: there is no file",
    "train grpo rollout.tools=[mine.py:serach]": "rollout.tools: mine.py has no `serach`",
    "train rpg --safe rewards=[{'function':mine.py:score}]": "--safe does not allow that",
    "compare compare compare.grid.dpo.bta=[0.1]": "Did you mean `beta`?",
    "plan dpo objective.bta=1": "Did you mean `beta`?",
    "verify dpoo": "did you mean `dpo`?",
}


def test_a_typo_needs_no_torch(tmp_path):
    (tmp_path / "mine.py").write_text("def score(prompts, completions):\n    ...\n\n\nLIMIT = 3\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "better": "b", "worse": "c"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    late = ['{"prompt": "a", "answer": null}\n'] * 200
    (tmp_path / "late.jsonl").write_text("".join([*late, '{"prompt": "a", "answer": "b"}\n']))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json").write_text('{"alignkit": "run folder"}')
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    script = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from alignkit.cli.main import app\n"
        "results = []\n"
        "for command in json.load(sys.stdin):\n"
        "    error = CliRunner().invoke(app, command).exception\n"
        "    results.append([str(error), 'torch' in sys.modules])\n"
        "print(json.dumps(results))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([command.split() for command in TYPOS]),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for (command, message), (said, has_torch) in zip(TYPOS.items(), json.loads(result.stdout)):
        assert message in said, command
        assert not has_torch, command


def class_of(name):
    module, cls, _ = locate(name)
    return getattr(import_module(module), cls)


def test_the_table_is_what_the_classes_say(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    # `python docs/make_objectives.py` writes it
    assert TABLE.read_text() == import_module("make_objectives").make_table()
    assert list(json.loads(TABLE.read_text())) == list(OBJECTIVES)


VALUES = (
    None,
    True,
    "",
    "x",
    "none",
    -1,
    0,
    0.5,
    1,
    1.5,
    2,
    1e308,
    math.nan,
    math.inf,
    [],
    [1],
    {},
)


def message(model, section):
    try:
        validated(model, section, Origin(), ("objective",))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_value_gets_the_message_of_the_class(name):
    """But for rules between fields, and divergences, of which more can be registered in Python."""
    cls = class_of(name)
    for field in [*cls.model_fields, "nonsense"]:
        for value in VALUES:
            before = message(fields_of(name), {field: value})
            after = message(cls, {field: value})
            rule = "`objective`: " in after or "unknown divergence" in after
            assert before == after or (rule and not before), (field, value)


def test_a_schema_that_the_table_cannot_say_is_refused():
    assert annotation({"type": "integer", "minimum": 2}) is not int
    with pytest.raises(ValueError, match="pattern is not understood"):
        annotation({"type": "string", "pattern": "a*"})
