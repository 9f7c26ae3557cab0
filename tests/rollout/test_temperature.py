"""A temperature other than 1 in training: policy, anchors and sampler describe one distribution."""

import pytest
import torch
from world import pair_rows, pairs, run, save_model, write_rows

from alignkit.batches import Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.files import read_jsonl
from alignkit.policies.load import load_pair

CODE = """
def score(prompts, completions, **columns): return [float(len(c)) for c in completions]
def longer(prompts, first, second): return [0.5 for _ in prompts]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    save_model(folder / "other", seed=1)
    (folder / "mine.py").write_text(CODE)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{3 + n}"} for n in range(4)])
    write_rows(folder / "pairs.jsonl", pair_rows(8))
    return folder


@pytest.fixture
def train(world, tmp_path, capsys):
    """Exit code, stderr and metrics of a run on the tiny model."""

    def call(recipe, rows, *overrides):
        settings = "train.steps=3 train.batch_size=4 train.warmup_steps=0 train.log_samples_every=0"
        paths = (f"model.name_or_path={world / 'model'}", f"data.train={world / rows}")
        out = tmp_path / "out"
        code = run(
            *("train", recipe, *paths, *settings.split(), f"output_dir={out}"),
            *("rollout.completions=2", "rollout.max_new_tokens=4", *overrides),
        )
        file = out / "metrics.jsonl"
        metrics = [row for row in read_jsonl(file) if "loss" in row] if file.exists() else []
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split()), metrics

    return call


@pytest.mark.parametrize("temperature", [0.5, 1.7])
@pytest.mark.parametrize("kind", ["frozen", "adapter_off", "other"])
def test_policy_and_reference_are_tempered_alike(world, kind, temperature):
    """Log-probs are those of the model's own logits over the temperature, and so is the exact KL."""
    adapter = AdapterConfig(r=2) if kind == "adapter_off" else None
    pair = load_pair(
        ModelConfig(name_or_path=str(world / "model"), adapter=adapter, layout="padded"),
        ReferenceConfig(kind=str(world / "other") if kind == "other" else kind),
        None,
        Plan("rollout"),
        fixed_data=False,
        temperature=temperature,
    )
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        (bundle,) = pairs(1, k=1)
        tokens = pair.logps([bundle], Plan("rollout"))
        ids = torch.cat([bundle.prompt, bundle.completions[0]])[None]
        for name, found in (("policy", tokens.policy), ("reference", tokens.reference)):
            with pair.model(name) as model:
                logits = model(ids).logits[0, len(bundle.prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(-1, bundle.completions[0][:, None])[:, 0]
            expected = torch.where(bundle.masks[0], expected, 0.0)
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    assert any(f"at temperature {temperature:g}; sample from" in note for note in pair.notes)


@pytest.mark.parametrize("recipe", ["rloo", "kl_ppo", "rpg", "grpo"])
def test_a_run_trains_on_the_log_probs_it_samples(train, world, recipe):
    code, text, metrics = train(
        recipe,
        "prompts.jsonl",
        f"rewards.0.function={world / 'mine.py'}:score",
        "rollout.temperature=0.7",
        "train.learning_rate=0.01",
    )
    assert code == 0, text
    assert "its KL measured at temperature 0.7" in text
    assert len(metrics) == 3
    assert all(row["sampling/logp_difference_max"] < 1e-4 for row in metrics)
    # the reference is tempered like the policy, so a run begins at no distance from it
    distances = [abs(metrics[0][name]) for name in metrics[0] if name.startswith("kl/")]
    assert max(distances) < 1e-5


def test_rows_of_a_file_come_from_no_temperature(train, world):
    """An objective that draws beside its pairs trains on both."""
    judge = f"judge.function={world / 'mine.py'}:longer"
    code, text, _ = train("drpo", "pairs.jsonl", judge, "rollout.temperature=0.7")
    assert code == 2
    assert "rollout.temperature: 0.7 samples from another distribution" in text


@pytest.mark.parametrize(
    "settings",
    [
        ["rollout.top_p=0.9"],
        ["rollout.top_k=5", "rollout.min_p=0.01", "rollout.temperature=0.7"],
        ["rollout.mask_truncated=true", "rollout.stop=[w5,w6 w7]"],
    ],
    ids=str,
)
def test_a_truncated_law_is_the_behaviour(train, world, settings):
    function = f"rewards.0.function={world / 'mine.py'}:score"
    code, text, metrics = train("grpo", "prompts.jsonl", function, *settings)
    assert code == 0, text
    truncated = "top_" in settings[0]
    assert (
        "the KL that is trained and logged is that of the full distribution" in text
    ) == truncated
    # what is drawn from part of a law is less likely under the whole of it
    assert (metrics[0]["importance"] < 0.999) == truncated
    if not truncated:
        assert metrics[0]["completions/clipped_ratio"] < 1


def test_who_does_not_weigh_samples_draws_from_the_whole_law(train, world):
    judge = f"judge.function={world / 'mine.py'}:longer"
    code, text, _ = train("online_dpo", "prompts.jsonl", judge, "rollout.top_p=0.9")
    assert code == 2
    assert "does not weigh its samples by the sampler's log-probs" in text


def test_a_stop_text_that_cannot_be_written_is_refused(train, world):
    function = f"rewards.0.function={world / 'mine.py'}:score"
    code, text, _ = train("rloo", "prompts.jsonl", function, "rollout.stop=[w5,End]")
    assert code == 2
    assert "rollout.stop: the tokenizer cannot make 'End'" in text
