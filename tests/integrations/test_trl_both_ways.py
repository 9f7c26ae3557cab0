"""Rewards, data and models go from TRL to alignkit and back as they are."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOTrainer
from trl_rewards import SEEN, full
from trl_world import COMMON, PAIRS, curve, dpo_trainer, grpo_trainer
from world import make_job, pairs

from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles, load_prompts
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.preference.dpo import DPO
from alignkit.rewards import load_rewards
from alignkit.training.loop import train


def test_a_trl_reward_function_runs_in_alignkit():
    SEEN.clear()
    reward = load_rewards(
        [{"function": f"trl_rewards:{name}"} for name in ("full", "later")], safe=False
    )
    state = SimpleNamespace(global_step=7)
    completions, ids = ["w11 w3", "w4", ""], [[11, 3], [4], []]
    values = reward(
        ["a", "b", "c"],
        completions,
        completion_ids=ids,
        trainer_state=state,
        answer=["x", "y", "z"],
    )
    # None of `full` for the empty one: `later` alone counts
    assert values == pytest.approx([2.2 + 3.0, 1 + 1.0, 0.0])
    assert SEEN.pop() == ({"answer"}, 7)
    assert reward.metrics["rewards/full/longest"] == 2


def test_alignkits_loop_gives_a_reward_function_what_trl_gives(model, tmp_path):
    """The same function in both loops: the same names reach it."""
    from online_world import online_job

    from alignkit.training.loop import train

    SEEN.clear()
    curve(
        grpo_trainer(
            as_trl_trainer(GRPO(beta=0), GRPOTrainer),
            model,
            tmp_path / "trl",
            rewards=full,
            max_steps=2,
        )
    )
    in_trl = [step for _, step in SEEN]
    reward = load_rewards([{"function": "trl_rewards:full"}], safe=False)
    SEEN.clear()
    job = online_job(model, tmp_path / "own", GRPO(beta=0), reward=reward, steps=2)
    with job.run:
        train(job)
    assert [step for _, step in SEEN] == in_trl == [0, 1]


def test_an_alignkit_reward_runs_in_trl(model, tmp_path):
    SEEN.clear()
    section = [
        {"function": "trl_rewards:full"},
        {"length": {"max_tokens": 5, "buffer": 2}, "weight": 0.5},
        {"verifier": "trl_rewards:judged", "workers": 1},
    ]
    reward = load_rewards(section, safe=False)
    trainer = grpo_trainer(
        as_trl_trainer(GRPO(beta=0), GRPOTrainer),
        model,
        tmp_path / "out",
        rewards=[reward],
        max_steps=2,
    )
    assert curve(trainer).isfinite().all()
    reward.close()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert rows[0]["rewards/full_length_judged/mean"] == pytest.approx(rows[0]["reward"])
    assert rows[0]["reward"] > 3
    assert SEEN[1][1] == 1  # TRL's own state went through


ALPHABET = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): 3 + i for i in range(20)}}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}a {% else %}b {% endif %}{{ m.content }} {% if m.role != 'user' %}</s> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}b {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel(ALPHABET, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
        chat_template=TEMPLATE,
    )


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


PREFERENCES = {
    "standard": [
        {"prompt": "c d", "chosen": " e f", "rejected": " g"},
        {"prompt": "h", "chosen": " i", "rejected": " j k l"},
    ],
    "standard, implicit": [
        {"chosen": "c d e f", "rejected": "c d g"},
        {"chosen": "h i", "rejected": "h j k l"},
    ],
    "conversational": [
        {"prompt": user("c d"), "chosen": assistant("e f"), "rejected": assistant("g")},
        {
            "prompt": [*user("h"), *assistant("m"), *user("n")],
            "chosen": assistant("i"),
            "rejected": assistant("j k l"),
        },
    ],
    "conversational, implicit": [
        {"chosen": user("c d") + assistant("e f"), "rejected": user("c d") + assistant("g")},
        {"chosen": user("h") + assistant("i"), "rejected": user("h") + assistant("j k l")},
    ],
}


@pytest.mark.parametrize("kind", PREFERENCES)
def test_preferences_become_the_same_tokens_in_both(model, tmp_path, tokenizer, kind):
    rows = PREFERENCES[kind]
    args = DPOConfig(
        str(tmp_path),
        **{**COMMON, "precompute_ref_log_probs": False},
        per_device_train_batch_size=len(rows),
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    real = batch["attention_mask"].bool()
    theirs = [
        (ids[keep].tolist(), trained[keep].tolist())
        for ids, keep, trained in zip(batch["input_ids"], real, batch["completion_mask"])
    ]
    bundles, report = load_bundles(DataConfig(), "pair", tokenizer, source=rows)
    assert report.usable == len(rows)
    ours = [
        (b.prompt.tolist() + ids.tolist(), [0] * len(b.prompt) + mask.int().tolist())
        for side in range(2)
        for b in bundles
        for ids, mask in [(b.completions[side], b.masks[side])]
    ]
    assert sorted(ours) == sorted(theirs)


def ids(text):
    return [ALPHABET[word] for word in text.split()]


def test_the_other_formats_load_as_they_are(tokenizer):
    rows = [{"prompt": "c d", "answer": "5"}, {"prompt": "e", "answer": "6"}]
    prompts, _ = load_prompts(DataConfig(), tokenizer, source=rows)
    assert [(p.ids.tolist(), p.columns["answer"]) for p in prompts] == [
        (ids("c d"), "5"),
        (ids("e"), "6"),
    ]
    prompts, _ = load_prompts(DataConfig(), tokenizer, source=[{"prompt": user("c d")}])
    assert prompts[0].ids.tolist() == ids("a c d b")
    assert prompts[0].text == user("c d")  # a reward sees messages, as in TRL

    unpaired = [
        {"prompt": "c", "completion": " d", "label": True},
        {"prompt": "c", "completion": " e", "label": False},
    ]
    chats = [
        {"prompt": user("c"), "completion": assistant("d"), "label": True},
        {**unpaired[1], "prompt": user("c"), "completion": assistant("e")},
    ]
    for given, expected in (
        (unpaired, ["c d </s>", "c e </s>"]),
        (chats, ["a c b d </s>", "a c b e </s>"]),
    ):
        bundles, _ = load_bundles(DataConfig(), "labelled", tokenizer, source=given)
        assert [b.prompt.tolist() + b.completions[0].tolist() for b in bundles] == [
            ids(text) for text in expected
        ]
        assert [bool(b.rows["label"][0]) for b in bundles] == [True, False]

    dialogue = [*user("c"), *assistant("d"), *user("e"), *assistant("f")]
    for row, text in (
        ({"text": "c d e"}, "c d e </s>"),
        ({"messages": dialogue}, "a c b d </s> a e b f </s>"),
        ({"prompt": "c", "completion": " d"}, "c d </s>"),
        ({"prompt": user("c"), "completion": assistant("d")}, "a c b d </s>"),
    ):
        bundles, report = load_bundles(DataConfig(), "sequence", tokenizer, source=[row])
        whole = bundles[0].prompt.tolist() + bundles[0].completions[0].tolist()
        assert whole[-len(ids(text)) :] == ids(text), json.dumps(row)
        assert report.usable == 1


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_folders_model_loads_in_a_trl_trainer(model, tmp_path, lora):
    job = make_job(
        model,
        tmp_path / "run",
        DPO(),
        pairs(8),
        lora=lora,
        steps=2,
        reference="adapter_off" if lora else "frozen",
    )
    with job.run:
        train(job)
    folder = tmp_path / "run" / "model"
    policy = (
        AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True) if lora else str(folder)
    )
    args = DPOConfig(str(tmp_path / "trl"), **COMMON, per_device_train_batch_size=2)
    for cls in (DPOTrainer, as_trl_trainer(DPO())):
        trainer = cls(
            policy,
            args=args,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        if cls is DPOTrainer:
            ids = torch.tensor([[5, 6, 7]])
            with torch.no_grad():
                assert torch.allclose(
                    trainer.model(ids).logits, job.pair.base.model(ids).logits, atol=1e-6
                )
            if lora:  # TRL put its own "ref" adapter into it
                policy = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
        assert curve(trainer)[0, 0] == pytest.approx(0.6931472, abs=1e-6)


def test_and_back(model, tmp_path):
    """What a TRL trainer saved is a model for alignkit."""
    trainer = dpo_trainer(as_trl_trainer(DPO()), model, tmp_path / "trl", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    job = make_job(tmp_path / "saved", tmp_path / "run", DPO(), pairs(8), steps=1)
    theirs, ours = trainer.model.state_dict(), job.pair.base.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with job.run:
        assert train(job).step == 1
