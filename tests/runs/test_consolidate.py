"""`alignkit checkpoint consolidate`: a checkpoint as a model that loads."""

import pytest
import torch
from safetensors.torch import load_file
from world import pair_rows, run, save_model, write_rows


@pytest.mark.parametrize("adapter", [False, True])
def test_the_checkpoint_of_the_last_step_is_the_finished_model(tmp_path, adapter, capsys):
    save_model(tmp_path / "base")
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(6))
    assert not run(
        "train", "dpo", f"model.name_or_path={tmp_path}/base", f"data.train={rows}",
        f"output_dir={tmp_path}/out", "train.steps=2", "train.batch_size=2", "train.save_every=5",
        *(["model.adapter.r=2"] if adapter else []),
    )  # fmt: skip
    assert not run("checkpoint", "consolidate", tmp_path / "out")

    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    made = tmp_path / "out" / "consolidated"
    expected = load_file(tmp_path / "out" / "model" / name)
    found = load_file(made / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not run("generate", made, "w3 w4")

    capsys.readouterr()
    assert run("checkpoint", "consolidate", tmp_path / "out") == 7
    assert "is there already; name a folder that does not exist" in capsys.readouterr().err
    assert run("checkpoint", "consolidate", tmp_path / "base") == 6
