"""Forked answers: every leaf is a sample of the model, and the two ends of a fork share a beginning."""

import json

import pytest
import torch
from world import VOCAB, run, save_model, write_rows

from alignkit.batches import Draw
from alignkit.rollout.hf import HFSampler
from alignkit.runs.forks import forked
from alignkit.runs.trained_model import load_finished

END = 2
PROMPT = torch.tensor([3, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    save_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """A model that ends at the next token with probability 0.4, whatever came before."""
    loaded = load_finished(str(folder / "model"))
    head = loaded.network.get_output_embeddings()

    class Ends(torch.nn.Module):
        weight = head.weight

        def forward(self, hidden):
            logits = head(hidden)
            others = torch.cat([logits[..., :END], logits[..., END + 1 :]], -1).logsumexp(-1)
            logits = logits.clone()
            logits[..., END] = others + torch.log(torch.tensor(0.4 / 0.6))
            return logits

    loaded.network.lm_head = Ends()
    return loaded


def test_every_leaf_has_the_models_law(model):
    """Of 600 answers of at most two tokens, how many end at once and how the first tokens are
    distributed, within 5 standard deviations; a fork at half of the answer's own length would make
    the leaves end at once with probability 0.16.
    """
    count = 600
    sampler = HFSampler(model, max_new_tokens=2, seed=0)
    prompts = [PROMPT] * count
    trunks = sampler.sample(prompts, Draw(2), step=0, prompt_ids=range(count))
    leaves = [row[1::2] for row in forked(sampler, prompts, trunks, 2)]

    with torch.no_grad():
        law = model.network(PROMPT[None]).logits[0, -1].softmax(-1)
    assert float(law[END]) == pytest.approx(0.4, abs=1e-6)
    for k in (0, 1):
        firsts = torch.tensor([int(row[k].ids[0]) for row in leaves])
        shares = torch.bincount(firsts, minlength=VOCAB) / count
        allowed = 5 * (law * (1 - law) / count).sqrt() + 1e-9
        assert ((shares - law).abs() < allowed).all()
        assert all(row[k].ended == (int(row[k].ids[-1]) == END) for row in leaves)


def test_the_ends_of_a_fork_share_their_beginning(model):
    sampler = HFSampler(model, max_new_tokens=6, seed=1)
    prompts = [PROMPT, torch.tensor([5])] * 20
    trunks = sampler.sample(prompts, Draw(3), step=0, prompt_ids=range(40))
    for row, leaves in zip(trunks, forked(sampler, prompts, trunks, 6)):
        assert leaves[::2] == list(row)
        for k, leaf in enumerate(leaves[1::2]):
            place = len(row[k - 1].ids) // 2
            assert leaf.ids[:place].tolist() == row[k].ids[:place].tolist()
            assert len(leaf.ids) == len(leaf.logps) <= 6
            assert place < len(row[k].ids) or leaf is row[k]


def test_the_command_writes_pairs_of_forks(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{i}"} for i in range(3, 9)])
    (folder / "judge.py").write_text(
        "def score(prompts, completions, **_):\n    return [float(len(t)) for t in completions]\n"
    )
    words = ["pairs", "model", "prompts.jsonl", "--reward", "judge.py:score", "--method", "tree"]
    limits = ["--max-new-tokens", "8", "--samples", "4", "--per-prompt", "2"]
    assert run(*words, *limits, "--to", "pairs.jsonl") == 0
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    shared = [row["chosen"].split()[:1] == row["rejected"].split()[:1] for row in rows]
    assert 6 <= len(rows) <= 12
    assert all(shared)
    assert run(*words, "--samples", "3", "--to", "other.jsonl") == 2
    assert "give an even number of at least 4" in capsys.readouterr().err
