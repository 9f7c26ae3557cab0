"""Rewards of tokens from what a rewriter would write in an answer's place: by hand, against a rewrite
that is drawn, and after training on pairs.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import run, save_model, write_rows

from alignkit.errors import ConfigError, DataError
from alignkit.rewards import load_rewards
from alignkit.rewards.rewriter import Rewriter, rewrite_rewards

ASK = " w15"


def test_by_hand():
    """The same up to the third token; there and at the last one the rewriter says otherwise."""
    assert rewrite_rewards([True, True, False, True, False]) == [1.0, 1.0, -1.0, 0.0, -1.0]
    assert rewrite_rewards([True, True]) == [1.0, 1.0]
    assert rewrite_rewards([False, True]) == [-1.0, 0.0]
    assert rewrite_rewards([]) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewriter")
    save_model(folder / "model", seed=3)
    return folder


@pytest.fixture(scope="module")
def rewriter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return Rewriter(model, AutoTokenizer.from_pretrained(folder / "model"), ASK)


def text_of(ids):
    return "".join(f" w{token}" for token in ids if token > 2)


def greedy(model, context, most):
    """The rewrite that is drawn greedily, token by token."""
    ids = list(context)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def test_the_first_difference_is_that_of_the_rewrite(rewriter):
    """Answers that begin as their rewrite does, of several lengths in one batch: + as long as the
    greedy rewrite is the same, then - where the likeliest token behind the answer's own is another.
    """
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randint(3, 23, (n,), generator=generator).tolist() for n in (4, 1, 7, 3)]
    answers = []
    for context, same, more in zip(contexts, (3, 0, 5, 2), (2, 1, 4, 0), strict=True):
        other = torch.randint(3, 23, (more,), generator=generator).tolist()
        answers.append([*greedy(rewriter.model, context, same), *other])
    assert any(len(set(answer[:same])) > 1 for answer, same in zip(answers, (3, 0, 5, 2)))

    agreed = rewriter.agreement(contexts, answers)
    for context, answer, flags in zip(contexts, answers, agreed, strict=True):
        rewrite = greedy(rewriter.model, context, len(answer))
        same = [one == other for one, other in zip(rewrite, answer)]
        first = same.index(False) if False in same else len(answer)
        wanted = [1.0] * first
        for place in range(first, len(answer)):
            likeliest = greedy(rewriter.model, [*context, *answer[:place]], 1)[0]
            wanted.append(0.0 if likeliest == answer[place] else -1.0)
        assert rewrite_rewards(flags) == wanted


def test_it_is_asked_behind_the_answer(rewriter):
    """In plain text, and in a chat as the user's next turn."""
    prompts, answers = ["w3 w4", "w7"], [[5, 6], [8]]
    rewards = rewriter(prompts, [*map(text_of, answers)], completion_ids=answers)
    agreed = rewriter.agreement([[3, 4, 5, 6, 15], [7, 8, 15]], answers)
    assert rewards == [*map(rewrite_rewards, agreed)]

    rewriter.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] | replace('u', 'w20') | replace('a', 'w21') }} "
        "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w21{% endif %}"
    )
    question = [{"role": "user", "content": "w3"}]
    said = [{"role": "assistant", "content": "w5 w6"}]
    rewards = rewriter([question], [said], completion_ids=[[5, 6, 2]])
    agreed = rewriter.agreement([[20, 3, 21, 5, 6, 20, 15, 21]], [[5, 6, 2]])
    assert rewards == [*map(rewrite_rewards, agreed)]
    assert rewriter._context(question, said, [5, 6, 2]) == [20, 3, 21, 5, 6, 20, 15, 21]
    rewriter.tokenizer.chat_template = None


def test_what_cannot_be_rewarded(folder, rewriter):
    with pytest.raises(DataError, match="only texts are scored"):
        rewriter(["w3"], [" w4"])
    with pytest.raises(DataError, match="needs the policy's tokenizer"):
        rewriter(["w3"], [" w4"], completion_ids=[[5]])
    turns = [{"role": "assistant", "content": "w4"}] * 2
    with pytest.raises(DataError, match="2 turns"):
        rewriter([[{"role": "user", "content": "w3"}]], [turns], completion_ids=[[4]])
    for entry in ({"rewriter": str(folder / "model")}, {"format": "a", "ask": ASK}):
        with pytest.raises(ConfigError, match="go together"):
            load_rewards([entry], safe=True)


def test_trained_on_pairs_it_rewards_what_they_choose(folder, monkeypatch):
    """`sft` with `data.rewrite`, then the recipe's reward: every token of a chosen answer gets 1, and a
    rejected one's first token, where its rewrite differs, -1. A rollout takes the sums.
    """
    monkeypatch.chdir(folder)
    prompts = [f"w{3 + i} w4" for i in range(6)]
    chosen = [[5, 6 + i, 2] for i in range(6)]
    rejected = [[7 + i, 2] for i in range(6)]
    rows = [
        {"prompt": prompt, "chosen": text_of(good), "rejected": text_of(bad)}
        for prompt, good, bad in zip(prompts, chosen, rejected)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    sizes = "steps: 60, batch_size: 12, learning_rate: 1.0e-2, warmup_steps: 0, save_every: 0"
    quiet = f"train={{{sizes}, eval_every: 0, log_samples_every: 0}}"
    where = ["model.name_or_path=model", "data={train: pairs.jsonl, eval: null}"]
    assert run("train", "sft", *where, f"data.rewrite={ASK!r}", quiet, "output_dir=run") == 0

    reward = load_rewards([{"rewriter": "run/model", "ask": ASK}], safe=True)
    assert reward(prompts, [*map(text_of, chosen)], completion_ids=chosen) == [3.0] * 6
    by_token = reward.parts[0].call(prompts, [*map(text_of, rejected)], completion_ids=rejected)
    assert [values[0] for values in by_token] == [-1.0] * 6
    sums = reward(prompts, [*map(text_of, rejected)], completion_ids=rejected)
    assert sums == [sum(values) for values in by_token]
