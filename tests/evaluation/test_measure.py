"""Measured figures against listing: a random model whose completions of up to three tokens are all
listed, and the reviews.
"""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import VOCAB, save_model

from alignkit.batches import Bundle
from alignkit.config.data import DataConfig
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.data.load import load_prompts
from alignkit.errors import DataError, ModelError
from alignkit.evaluation.exact import Listed, listed_reviews
from alignkit.evaluation.measure import (
    LIVE,
    Yardstick,
    evaluation_pair,
    perplexity,
    preference_margins,
    scored,
)
from alignkit.evaluation.measurements import Measured
from alignkit.metrics.intervals import sampling_interval
from alignkit.objectives import OBJECTIVES, locate
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies.load import load_pair
from alignkit.runs.trained_model import load_finished
from alignkit.tasks import resolve

CAP, EOS = 3, 2
REPEATS, EACH = 200, 16
ROWS = [{"prompt": "w3 w4 w5"}, {"prompt": "w9"}, {"prompt": "w20 w7", "bonus": 0.5}]


def worth(prompts, completions, *, completion_ids, bonus, **_):
    """A sum over tokens, so that its expectation is a sum over prefixes; a column adds to it."""
    return [sum(i % 5 for i in ids) + (extra or 0.0) for ids, extra in zip(completion_ids, bonus)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_model(folder / "policy", seed=1), save_model(folder / "reference", seed=2)


@pytest.fixture(scope="module")
def pair(folders):
    return evaluation_pair(*folders)


@pytest.fixture(scope="module")
def prompts(pair):
    rows = [{"bonus": None, **row} for row in ROWS]
    return load_prompts(DataConfig(), pair.tokenizer, source=rows)[0]


@torch.no_grad()
def listed(folders, prompt):
    """Exact expectations over every completion: each prefix adds its probability times what its
    next token brings.
    """
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    prefixes, mass, back = (
        torch.zeros(1, 0, dtype=torch.int64),
        torch.ones(1).double(),
        torch.ones(1).double(),
    )
    found = dict.fromkeys(("score", "kl", "forward_kl", "entropy", "length"), 0.0)
    for _ in range(CAP):
        ids = torch.cat([prompt.expand(len(prefixes), -1), prefixes], dim=1)
        p, q = (
            model(input_ids=ids).logits[:, -1].double().log_softmax(-1)
            for model in (policy, reference)
        )
        found["kl"] += float(mass @ (p.exp() * (p - q)).sum(-1))
        found["forward_kl"] += float(back @ (q.exp() * (q - p)).sum(-1))
        found["entropy"] -= float(mass @ (p.exp() * p).sum(-1))
        found["score"] += float(mass @ (p.exp() @ (torch.arange(VOCAB) % 5).double()))
        found["length"] += float(mass.sum())
        kept = torch.tensor([token for token in range(VOCAB) if token != EOS])
        prefixes = torch.cat(
            [prefixes.repeat_interleave(len(kept), 0), kept.repeat(len(prefixes))[:, None]], dim=1
        )
        mass, back = ((m[:, None] * x[:, kept].exp()).flatten() for m, x in ((mass, p), (back, q)))
    return found


@pytest.fixture(scope="module")
def exact(folders, prompts):
    """Means over the prompts; the bonus of the third prompt is for sure."""
    rows = [listed(folders, prompt.ids[None]) for prompt in prompts]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means | {"score": means["score"] + 0.5 / 3}


@pytest.fixture(scope="module")
def measured(pair, prompts):
    yardstick = Yardstick(prompts, samples=REPEATS * EACH, max_new_tokens=CAP, reward=worth)
    base = yardstick.measure_reference(pair)
    return base, yardstick.measure(pair, "policy", base=base)


def test_every_figure_is_the_listed_one(measured, exact):
    """Within 4.5 standard errors; the Rao-Blackwellised KL is the sharper estimate of the two."""
    _, found = measured
    figures = {
        "score": found.score,
        "kl": found.kl,
        "forward_kl": found.forward_kl,
        "entropy": found.entropy,
        "length": found.lengths,
    }
    for name, values in {**figures, "k1": found.log_ratio}.items():
        close = sampling_interval(values)
        error = (close.high - close.low) / (2 * 1.96)
        assert close.value == pytest.approx(
            exact["kl" if name == "k1" else name], abs=4.5 * error
        ), name
        assert error < 0.02 * exact["length"]
    errors = found.standard_errors()
    assert errors["kl"] < 0.7 * errors["kl_k1"]


def covered(values, exact):
    """In how many of 200 repeats of 16 completions per prompt the 95 % interval holds the exact
    mean.
    """
    parts = values.reshape(len(values), REPEATS, EACH)
    close = [sampling_interval(parts[:, r]) for r in range(REPEATS)]
    return sum(c.low <= np.mean(exact) <= c.high for c in close)


def test_sampled_figures_cover_the_listed_ones(measured, exact):
    """At the nominal rate: 200 repeats of 95 %, within three binomial standard errors (4.6 %). Not
    so the entropy of so few completions (169 of 200): a rare early end takes a whole token's
    entropy away, and 16 completions hold one or none.
    """
    _, found = measured
    figures = {"score": found.score, "kl": found.kl, "forward_kl": found.forward_kl}
    hits = {name: covered(values, exact[name]) for name, values in figures.items()}
    assert all(181 <= hit <= 199 for hit in hits.values()), hits
    assert exact["kl"] > 0.1


def test_the_reference_is_measured_like_a_model(measured, folders, prompts):
    base, _ = measured
    assert base.kl.max() == 0
    again = Yardstick(prompts, samples=20, max_new_tokens=CAP, reward=worth).measure(
        evaluation_pair(folders[1], folders[1]), "same"
    )
    # the same noise, however many samples are drawn
    assert again.tokens == [row[:20] for row in base.tokens]
    assert np.abs(again.kl).max() < 1e-6
    assert np.abs(again.logp - base.logp[:, :20]).max() < 1e-5
    assert (again.score == base.score[:, :20]).all()


def test_sums_are_those_of_plain_forward_passes(measured, folders, prompts):
    _, found = measured
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    for p, k in ((0, 0), (1, 3), (2, 7)):
        row = torch.tensor([*prompts[p].ids.tolist(), *found.tokens[p][k]])
        start, ids = len(prompts[p].ids), torch.tensor(found.tokens[p][k])
        with torch.no_grad():
            ours, theirs = (
                m(input_ids=row[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
                for m in models
            )
        sums = [float(logps.gather(-1, ids[:, None]).sum()) for logps in (ours, theirs)]
        assert [found.logp[p, k], found.reference_logp[p, k]] == pytest.approx(sums, abs=1e-4)
        assert found.kl[p, k] == pytest.approx(
            float((ours.exp() * (ours - theirs)).sum()), abs=1e-4
        )
        assert found.lengths[p, k] == len(ids) <= CAP
        assert found.ended[p, k] == (ids[-1] == EOS)


def test_intervals_over_prompts_cover_the_figure_of_all_prompts(measured):
    """Forty prompts drawn from these three, eight completions of each, 200 times. A percentile
    interval of 40 prompts covers about 94 %; 200 repeats of 95 % spread by 1.5 %.
    """
    _, found = measured
    rng, hits = np.random.default_rng(0), {"score": 0, "kl": 0, "kl_k1": 0}
    for _ in range(200):
        rows, columns = rng.integers(3, size=(40, 1)), rng.integers(1000, size=(40, 8))
        part = {
            name: getattr(found, name)[rows, columns]
            for name in ("ended", "score", "kl", "logp", "reference_logp", "entropy")
        }
        drawn = Measured("drawn", [""] * 40, [[""]] * 40, [[[1]]] * 40, **part)
        means = drawn.per_prompt()
        truth = {
            "score": found.score.mean(),
            "kl": found.kl.mean(),
            "kl_k1": found.log_ratio.mean(),
        }
        summary = drawn.summary(draws=300)
        for name in hits:
            assert summary[name].value == pytest.approx(means[name].mean())
            hits[name] += summary[name].low <= truth[name] <= summary[name].high
    assert all(177 <= hit <= 198 for hit in hits.values()), hits


def test_it_is_kept_as_json(measured):
    _, found = measured
    again = Measured.load(json.loads(json.dumps(found.dump())))
    assert again.texts == found.texts
    for name in ("score", "kl", "forward_kl", "logp", "ended"):
        assert (getattr(again, name) == getattr(found, name)).all()
    hole = Measured.load({**found.dump(), "score": [[None, 1.0]]})
    assert np.isnan(hole.score[0, 0])


def test_perplexity_of_held_out_text(pair, folders):
    found = perplexity(pair, [{"text": "w3 w4 w5 w6"}, {"text": "w9 w8"}])
    nll, count = [0.0, 0.0], 0
    for text in ("w3 w4 w5 w6", "w9 w8"):
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"], EOS])
        for i, folder in enumerate(folders):
            with torch.no_grad():
                logps = (
                    AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids[None])
                    .logits[0, :-1]
                    .log_softmax(-1)
                )
            nll[i] -= float(logps.gather(-1, ids[1:, None]).sum())
        count += len(ids) - 1
    assert found.tokens == count
    assert (found.policy, found.reference) == pytest.approx(
        (np.exp(nll[0] / count), np.exp(nll[1] / count)), rel=1e-4
    )


def test_preferences_are_the_objectives_own(pair):
    rows = [{"prompt": "w3", "chosen": f"w{5 + i} w4", "rejected": f"w{12 - i}"} for i in range(5)]
    plain = preference_margins(pair, rows)
    assert preference_margins(pair, rows, objective=DPO(beta=0.3)) == pytest.approx(
        0.3 * plain, abs=1e-4
    )
    assert np.abs(plain).min() > 1e-3
    same = evaluation_pair("task:reviews_small", "task:reviews_small")
    assert (
        np.abs(
            preference_margins(
                same, [{"prompt": "the western", "chosen": " gripping", "rejected": " thin"}]
            )
        ).max()
        < 1e-6
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_finished_runs_of_every_objective_have_margins_or_none(folders, name):
    """Not an error for want of what only the run itself had: other anchors, samples, verdicts."""
    rows = [{"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7"}]
    pair = evaluation_pair(*folders)
    module, cls, _ = locate(name)
    for objective in getattr(import_module(module), cls).examples():
        margins = preference_margins(pair, rows, objective=objective)
        assert margins is None or np.isfinite(margins).all()


def test_adapters_are_measured_as_they_were_trained(folders, prompts, tmp_path):
    base = ModelConfig(name_or_path=str(folders[1]), adapter=AdapterConfig(r=2, alpha=4))
    trained = load_pair(base, ReferenceConfig(kind="adapter_off"), None, LIVE, fixed_data=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.3)
    trained.save(tmp_path / "adapter")
    bundles = [Bundle(prompts[0].ids, [torch.tensor([4, 5, 2])], [torch.ones(3, dtype=torch.bool)])]
    found = scored(evaluation_pair(tmp_path / "adapter", folders[1]), bundles, LIVE)
    with torch.no_grad():
        logps = trained.logps(bundles, LIVE)
    wanted = [float(logps.sequence()), float(logps.sequence("reference"))]
    assert [*found["logp"], *found["reference_logp"]] == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted[0] - wanted[1]) > 0.1


def test_models_of_other_tokens_are_refused(folders, tmp_path):
    other = tmp_path / "other"
    save_model(other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w7"', '"seven"'))
    with pytest.raises(ModelError, match="have different tokenizers"):
        evaluation_pair(folders[0], other)
    with pytest.raises(ModelError, match="have different tokenizers"):
        evaluation_pair(other, load_finished(str(folders[1])))
    with pytest.raises(ModelError, match="there is no folder"):
        evaluation_pair(tmp_path / "nowhere", folders[1])


def test_an_empty_prompt_file_is_refused(pair, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(DataError, match="has 0 rows"):
        load_prompts(DataConfig(), pair.tokenizer, source=tmp_path / "prompts.jsonl")


@pytest.fixture(scope="module")
def sharper(tmp_path_factory):
    """The base model of the small reviews with a sharper head: another policy, and hardly any of it
    outside the grammar.
    """
    task, folder = resolve("task:reviews_small"), tmp_path_factory.mktemp("sharp") / "model"
    model = AutoModelForCausalLM.from_pretrained(task.model_folder)
    with torch.no_grad():
        model.lm_head.weight *= 1.2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(task.model_folder).save_pretrained(folder)
    return folder


def test_sampled_figures_cover_the_exact_ones_of_a_task(sharper):
    """The same on the small reviews, 16 completions for each of 4 prompts. Listing counts what the
    grammar cannot write as one outcome, so its KL is below the sampled one by what happens there:
    nothing to speak of for this policy. Plain log-ratios have rare large values, so the interval of
    few of them covers less often.
    """
    task = resolve("task:reviews_small")
    pair = evaluation_pair(sharper, task.model_folder)
    prompts, _ = load_prompts(DataConfig(), pair.tokenizer, source=task.rows("rollout", "eval"))
    found = Yardstick(
        prompts, samples=REPEATS * EACH, max_new_tokens=8, reward=task.reward
    ).measure(pair, "sharper")
    true = Listed(listed_reviews("task:reviews_small"), task.model_folder).figures(sharper)
    hits = [
        covered(*of)
        for of in ((found.score, true.score), (found.kl, true.kl), (found.log_ratio, true.kl))
    ]
    assert all(181 <= hit <= 199 for hit in hits[:2]), hits
    assert hits[2] >= 175, hits


def test_exact_figures_lie_below_the_optimal_frontier(sharper):
    task = resolve("task:reviews_small")
    world = Listed(listed_reviews("cyclic_small"), task.model_folder)
    found = world.figures(sharper)
    assert found.score.mean() <= world.optimal.score_at(found.kl.mean())
    assert (found.forward_kl > 0).all()
    assert world.base.mean() == pytest.approx(world.optimal.base_score, abs=1e-12)
    best = world.best_of_n(4)
    assert best.score.mean() <= world.optimal.score_at(best.kl.mean())
    assert listed_reviews("task:arithmetic") is None
