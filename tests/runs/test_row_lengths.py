"""Rows longer than the model's positions: a sentence before training, not a traceback within."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from world import VOCAB, run, save_model, write_rows

from alignkit.batches import Bundle
from alignkit.config.recipe import load_recipe
from alignkit.errors import DataError
from alignkit.plan import Plan
from alignkit.policies.module import PolicyModule, context_length, position_table
from alignkit.policies.pair import PolicyPair
from alignkit.runs.launch import run_recipe
from alignkit.runs.row_lengths import positions_of

POSITIONS = 24
LONG = " ".join(["w4"] * 30)
HELPERS = "def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Llama of 128 rotary positions, and a GPT-2 of 24 learned ones with the same tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "rotary")
    save_model(folder / "table")
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "table")

    short = {"prompt": "w3", "chosen": " w5", "rejected": " w6"}
    long = {"prompt": "w3", "chosen": f" {LONG}", "rejected": " w6"}
    write_rows(folder / "long.jsonl", [short, long, short | {"prompt": "w7"}])
    write_rows(folder / "short.jsonl", [short, short | {"prompt": "w8"}])
    write_rows(folder / "beyond.jsonl", [short, long | {"chosen": f" {LONG}" * 5}])
    write_rows(folder / "prompts.jsonl", [{"prompt": "w3"}, {"prompt": LONG}])
    (folder / "helpers.py").write_text(HELPERS)
    return folder


def arguments(world, out, model, rows, *overrides):
    return [
        f"model.name_or_path={world / model}",
        f"data.train={world / rows}",
        f"output_dir={out}",
        "data.eval=null",
        "train.steps=1",
        "train.batch_size=2",
        "train.save_every=0",
        "train.log_samples_every=0",
        *overrides,
    ]


TOO_LONG = rf"long.jsonl: 1 of 3 rows are longer than the {POSITIONS} positions of the model"


@pytest.mark.parametrize("recipe", ["dpo", "sft", "reward_model"])
@pytest.mark.parametrize("side", ["train", "eval"])
def test_rows_beyond_a_table_of_positions_are_refused(world, tmp_path, recipe, side):
    given = arguments(world, tmp_path / "run", "table", "long.jsonl")
    if side == "eval":
        given = arguments(
            world, tmp_path / "run", "table", "short.jsonl", f"data.eval={world / 'long.jsonl'}"
        )
    # The last token of a row is predicted and takes no position, but a reward model reads it.
    limit = POSITIONS + (recipe != "reward_model")
    with pytest.raises(DataError, match=rf"{TOO_LONG}.*set data.max_length={limit} or lower"):
        run_recipe(load_recipe(recipe, given))
    with pytest.raises(DataError, match=rf"{TOO_LONG}.*the longest: {limit + 1} tokens"):
        run_recipe(load_recipe(recipe, [*given, f"data.max_length={limit + 1}"]))

    run_recipe(load_recipe(recipe, [*given, f"data.max_length={limit}"]))  # which then works


def test_the_exit_code_is_that_of_data(world, tmp_path, capsys):
    given = arguments(world, tmp_path / "run", "table", "long.jsonl")
    assert run("train", "dpo", *given) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_rows_beyond_rotary_positions_are_a_warning(world, tmp_path, capsys):
    run_recipe(load_recipe("dpo", arguments(world, tmp_path / "run", "rotary", "beyond.jsonl")))
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 rows are longer than the 128 positions of the model" in said
    assert "set data.max_length=129 or lower" in said


@pytest.mark.parametrize("model", ["table", "rotary"])
def test_prompts_that_leave_no_room_are_refused_at_the_start(world, tmp_path, model):
    room = 12 if model == "table" else 120
    given = arguments(
        world,
        tmp_path / "run",
        model,
        "prompts.jsonl",
        f"rewards=[{{function: '{world / 'helpers.py'}:score'}}]",
        f"rollout.max_new_tokens={room}",
        "rollout.completions=2",
    )
    with pytest.raises(DataError, match=r"prompts.jsonl: 1 of 2 prompts .* exceed the") as caught:
        run_recipe(load_recipe("rloo", given))
    advice = str(caught.value).split("set ")[1].split(" ")[0]
    run_recipe(load_recipe("rloo", [*given, advice]))


@pytest.mark.parametrize("recipe", ["rloo", "grpo"])
def test_prompts_and_new_tokens_may_fill_a_table_of_positions(world, tmp_path, recipe):
    """The last token is drawn and never read, so it takes no position."""
    write_rows(tmp_path / "full.jsonl", [{"prompt": " ".join(["w4"] * 15)}, {"prompt": "w3"}])
    given = arguments(
        world,
        tmp_path / "run",
        "table",
        tmp_path / "full.jsonl",
        f"rewards=[{{function: '{world / 'helpers.py'}:score'}}]",
        "rollout.completions=2",
    )
    prompt = 15
    fits = POSITIONS + 1 - prompt
    with pytest.raises(DataError, match=rf"1 of 2 prompts .*{prompt} tokens.* exceed the"):
        run_recipe(load_recipe(recipe, [*given, f"rollout.max_new_tokens={fits + 1}"]))
    run_recipe(load_recipe(recipe, [*given, f"rollout.max_new_tokens={fits}"]))


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 48}
TABLES = {
    "gpt2": (GPT, 48),
    "gptj": (GPT | {"rotary_dim": 8}, 48),
    "codegen": (GPT | {"rotary_dim": 8}, 48),
    "gpt_bigcode": (GPT, 48),
    "opt": (SMALL | {"ffn_dim": 32, "max_position_embeddings": 48, "word_embed_proj_dim": 32}, 48),
    "biogpt": (SMALL | {"intermediate_size": 32, "max_position_embeddings": 48}, 48),
    "roberta": (SMALL | {"intermediate_size": 32, "max_position_embeddings": 50}, 48),
    "mpt": ({"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 48}, 48),
    "llama": (SMALL | {"intermediate_size": 32, "max_position_embeddings": 48}, None),
    "gpt_neox": (SMALL | {"intermediate_size": 32, "max_position_embeddings": 48}, None),
    "bloom": ({"hidden_size": 32, "n_layer": 1, "n_head": 2}, None),
}


@pytest.mark.parametrize("family", TABLES)
def test_the_table_is_as_long_as_the_model_can_read(family):
    settings, size = TABLES[family]
    config = AutoConfig.for_model(
        family, vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=1, **settings
    )
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config).eval()
    assert position_table(model) == size
    assert context_length(model) >= 48

    with torch.no_grad():
        model(torch.full((1, 48), 5))
        if size is None:
            model(torch.full((1, 49), 5))
            return
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(torch.full((1, 49), 5))


STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def test_branches_that_are_together_longer_than_the_table_fit():
    """A row of several completions has more tokens than positions, and so do the pads of another."""
    config = GPT2Config(vocab_size=61, **GPT, bos_token_id=1, eos_token_id=2, **STILL)
    module = PolicyModule(GPT2LMHeadModel(config).eval())
    ids = torch.arange(49) % 7 + 3
    bundles = [
        Bundle(ids[:1], [ids[1:], ids[1:].flip(0)], [torch.ones(48, dtype=torch.bool)] * 2),
        Bundle(ids[:1], [ids[1:3], ids[2:4]], [torch.ones(2, dtype=torch.bool)] * 2),
    ]
    assert [positions_of(bundle) for bundle in bundles] == [48, 2]
    logps = [
        PolicyPair(module, None, {}, layout=layout).logps(bundles, Plan("pair", anchors=())).policy
        for layout in ("shared_prefix", "padded")
    ]
    torch.testing.assert_close(*logps, rtol=0, atol=1e-5)


def test_any_other_way_into_the_model_is_checked_too():
    config = GPT2Config(vocab_size=61, **GPT, bos_token_id=1, eos_token_id=2)
    module = PolicyModule(GPT2LMHeadModel(config).eval())
    pair = PolicyPair(module, None, {}, layout="padded")
    plan = Plan("sequence", anchors=())
    ids = torch.full((49,), 5)
    mask = torch.ones(49, dtype=torch.bool)
    with pytest.raises(DataError, match="a row reaches position 49, but the model has 48"):
        pair.logps([Bundle(ids[:1], [ids], [mask])], plan)
    pair.logps([Bundle(ids[:1], [ids[1:]], [mask[1:]])], plan)
