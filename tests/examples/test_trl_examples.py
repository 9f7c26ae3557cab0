"""Each example with TRL runs as its first lines say and leaves a model that transformers or peft loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from world import save_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["trl_hdpo", "trl_radpo_lora", "trl_rpg", "trl_custom_objective"])
def test_example_runs(name, tmp_path):
    model = save_model(tmp_path / "model")
    rows = [{"prompt": f"w{3 + i} w4", "chosen": f" w{5 + i} w6", "rejected": " w7 w8 w9"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 120
    command = [sys.executable, str(script), str(model), str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub"), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"model.safetensors", "adapter_model.safetensors"} & {p.name for p in (tmp_path / "out").iterdir()}
