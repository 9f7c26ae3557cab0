"""Decoders of a small transformers model: their samples against the enumerated law, the KL and the
price that they report, and what they refuse.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from number_texts import Tokens, worth
from small_models import enumerate_completions, models_of, next_logits, p_value, small_model

from alignkit.config.decode import DecodeConfig
from alignkit.data.prompts import Prompt
from alignkit.decoding import best_of_n, quasi_rejection, soft_best_of_n
from alignkit.decoding.making import make_decoder
from alignkit.errors import ConfigError, DataError, ModelError, NumericsError

POLICY = small_model(seed=1)
REFERENCE = small_model(seed=2)
PROMPT = Prompt(torch.tensor([2, 3, 1]), "2 3 1", "0", {})
OTHER = Prompt(torch.tensor([1, 2]), "1 2", "1", {})
CAP = 3


def models():
    named = models_of(POLICY, REFERENCE)
    return SimpleNamespace(model=named.model, together=nullcontext, tokenizer=Tokens())


def decoder_of(reward=worth, **fields):
    return make_decoder(DecodeConfig(**fields), models(), reward=reward, max_new_tokens=CAP)


def outcomes(model=POLICY):
    """Every completion with its probability and its reward."""
    law = enumerate_completions(
        lambda ids: next_logits(model, ids).log_softmax(-1), PROMPT.ids.tolist(), CAP
    )
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    texts = [" ".join(map(str, ids)) for ids in law]
    return list(law), p / p.sum(), torch.tensor(worth(None, texts), dtype=torch.float64)


LAWS = {
    "best_of": ({"n": 3}, lambda p, r: best_of_n(p, r, 3)),
    "soft_best_of": ({"n": 4, "beta": 0.4}, lambda p, r: soft_best_of_n(p, r, 4, 0.4)),
    "reject": ({"beta": 0.7, "bound": 3.0}, lambda p, r: quasi_rejection(p, r, 0.7, 3.0)[0]),
}


@pytest.mark.parametrize("method", LAWS)
def test_samples_follow_the_law_and_its_kl(method):
    fields, law_of = LAWS[method]
    ids, p, rewards = outcomes()
    law = law_of(p, rewards)
    decoded = decoder_of(method=method, **fields).decode([PROMPT], 1500)

    samples = [SimpleNamespace(ids=row) for row in decoded.ids[0]]
    assert p_value(samples, dict(zip(ids, law.tolist()))) > 1e-3
    assert p_value(samples, dict(zip(ids, p.tolist()))) < 1e-9

    kl = float((law * (law / p).log()).sum())
    error = 4 * float(decoded.kl.std()) / 1500**0.5
    low = decoded.kl if decoded.kl_low is None else decoded.kl_low
    bias = 0.05 if method == "best_of" else 0.0  # the estimator takes outcomes for distinct rewards
    assert float(low.mean()) - error - bias < kl < float(decoded.kl.mean()) + error + bias


def test_particles_know_the_kl_of_their_law():
    """Of one particle it is 0; of several Zhat has the mean Z, and the interval holds the KL."""
    one = decoder_of(method="smc", particles=1, beta=0.5, fresh=2).decode([PROMPT], 20)
    assert np.abs(one.kl).max() < 1e-9
    assert np.abs(one.kl_low).max() < 1e-9

    fields = {"particles": 4, "beta": 0.4, "every": 1, "ess": 1.0, "fresh": 4}
    decoded = decoder_of(method="smc", twist="reward", twist_beta=1.0, **fields).decode(
        [PROMPT], 400
    )
    law = {}
    for row in decoded.ids[0]:
        key = tuple(row.tolist())
        law[key] = law.get(key, 0) + 1 / 400
    ids, p, _ = outcomes()
    plugin = sum(q * np.log(q / float(p[ids.index(key)])) for key, q in law.items())
    plugin -= (len(law) - 1) / 800  # the plug-in estimate is too high by this (Miller 1955)
    assert decoded.kl_low.mean() - 0.1 < plugin < decoded.kl.mean() + 0.1
    assert (decoded.reward_calls > 4).all()
    assert (decoded.tokens <= 4 * CAP).all()


SAME = [
    {"method": "smc", "particles": 4, "beta": 0.4, "every": 1, "ess": 1.0, "twist": "reward"}
    | {"fresh": 2},
    {"method": "soft_best_of", "n": 3, "beta": 0.4},
]


@pytest.mark.parametrize("fields", SAME, ids=lambda fields: fields["method"])
def test_batches_change_no_sample(fields):
    """As for every sampler: the noise belongs to prompt, completion, slot and position."""
    whole = decoder_of(**fields)
    parts = decoder_of(**fields)
    for holder in (parts, getattr(parts, "sampler", parts)):
        if hasattr(holder, "token_budget"):
            object.__setattr__(holder, "token_budget", 30)
    one = whole.decode([PROMPT, OTHER], 5)
    other = parts.decode([PROMPT, OTHER], 5)
    for row, same in zip(one.ids, other.ids):
        assert all(torch.equal(x, y) for x, y in zip(row, same))
    np.testing.assert_allclose(one.kl, other.kl, atol=1e-5)

    fewer = whole.decode([PROMPT, OTHER], 3)
    for row, same in zip(one.ids, fewer.ids):
        assert all(torch.equal(x, y) for x, y in zip(row, same))


@pytest.mark.parametrize(
    "weights",
    [{"policy": 1.5, "reference": -0.5}, {"policy": 0.3, "reference": 0.7}, {"policy": 1.0}],
)
def test_a_fusion_follows_its_law_and_measures_to_the_reference(weights):
    decoded = decoder_of(method="fuse", weights=weights).decode([PROMPT], 2000)
    parts = {"policy": POLICY, "reference": REFERENCE}

    def fused(ids):
        return (
            torch.stack([w * next_logits(parts[name], ids) for name, w in weights.items()])
            .sum(0)
            .log_softmax(-1)
        )

    q = enumerate_completions(fused, PROMPT.ids.tolist(), CAP)
    samples = [SimpleNamespace(ids=row) for row in decoded.ids[0]]
    assert p_value(samples, q) > 1e-3
    ids, p, _ = outcomes(REFERENCE)
    kl = sum(q[y] * np.log(q[y] / float(p[ids.index(y)])) for y in q)
    assert abs(decoded.kl.mean() - kl) < 4 * decoded.kl.std() / 2000**0.5
    assert (decoded.tokens[0] == [len(weights) * len(row) for row in decoded.ids[0]]).all()


def only_finished(prompts, completions, **_):
    """A reward that does not apply to texts without an end."""
    return [1.0 if "0" in text.split() else None for text in completions]


def raising(prompts, completions, **_):
    raise ValueError("no closing bracket\nsecond line")


BAD = [
    ({"method": "best_of", "n": 2, "reward": None}, ConfigError, "nothing says by which reward"),
    ({"method": "best_of", "n": 2, "reward": only_finished}, DataError, "gives no score"),
    (
        {"method": "smc", "particles": 2, "beta": 1.0, "twist": "reward", "every": 1}
        | {"reward": only_finished},
        DataError,
        "cannot score unfinished text",
    ),
    ({"method": "reject", "beta": 0.01, "bound": 1e300, "tries": 9}, NumericsError, "raise `beta`"),
]


@pytest.mark.parametrize(
    ("fields", "error", "words"), BAD, ids=lambda x: getattr(x, "__name__", "")
)
def test_what_cannot_be_decoded_is_said_in_one_sentence(fields, error, words):
    with pytest.raises(error, match=words) as caught:
        decoder_of(**fields).decode([PROMPT], 4)
    assert "\n" not in str(caught.value)


def test_models_of_several_vocabularies_are_refused():
    smaller = SimpleNamespace(network=small_model(vocab=3), tokenizer=Tokens())
    config = DecodeConfig(method="fuse", weights={"policy": 1.0, "other": 1.0})
    with pytest.raises(ModelError, match="other has another vocabulary"):
        make_decoder(config, models(), reward=None, max_new_tokens=CAP, load=lambda name: smaller)
