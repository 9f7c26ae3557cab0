"""Decoders measured as finished models are: the same prompts, the same noise, the same score."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from alignkit.config.decode import SHAPE, DecodeConfig
from alignkit.decoding.laws import best_of_n, quasi_rejection, soft_best_of_n
from alignkit.decoding.making import make_decoder
from alignkit.evaluation.exact import Listed
from alignkit.evaluation.measure import LIVE, Yardstick, bundle_of, evaluation_pair, scored
from alignkit.evaluation.measurements import Measured
from alignkit.metrics.intervals import Array
from alignkit.rollout.generate import OneModel
from alignkit.rollout.text import decode_all
from alignkit.runs.learned_value import load_value
from alignkit.runs.trained_model import load_finished

# Method -> its exact law over outcomes that can be listed, from the reference and the rewards.
LAWS: Mapping[str, Callable[[DecodeConfig, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sample": lambda config, p, r: p,
    "best_of": lambda config, p, r: best_of_n(p, r, config.n or 1),
    "soft_best_of": lambda config, p, r: soft_best_of_n(p, r, config.n or 1, config.beta or 0),
    "reject": lambda config, p, r: quasi_rejection(p, r, config.beta or 0, config.bound or 0)[0],
}


def measure_decoder(
    config: DecodeConfig,
    yardstick: Yardstick,
    reference: OneModel,
    name: str,
    *,
    safe: bool = False,
) -> Measured:
    """Samples of a decoder with what is known of their KL to the reference, and their price.

    A decoder that chooses among samples of its model knows its KL to that model; what the model is
    away from the reference along each sample comes on top. Raises what `make_decoder` and the
    decoder raise.
    """
    pair = evaluation_pair(config.model, reference)
    decoder = make_decoder(
        config,
        pair,
        reward=yardstick.reward,
        max_new_tokens=yardstick.max_new_tokens,
        seed=yardstick.seed,
        safe=safe,
        load=load_finished,
        load_value=load_value,
    )
    decoded = decoder.decode(yardstick.prompts, yardstick.samples)

    kl = decoded.kl
    kl_low = decoded.kl_low
    reference_logp = decoded.reference_logp
    if reference_logp is None:
        bundles = [bundle_of(p.ids, ids) for p, ids in zip(yardstick.prompts, decoded.ids)]
        sums = scored(pair, bundles, LIVE)
        reference_logp = np.array(sums["reference_logp"]).reshape(kl.shape)
        shift = np.array(sums["logp"]).reshape(kl.shape) - reference_logp
        kl = kl + shift
        kl_low = None if kl_low is None else kl_low + shift

    texts = decode_all(pair.tokenizer, decoded.ids)
    return Measured(
        name=name,
        prompts=[prompt.text for prompt in yardstick.prompts],
        texts=texts,
        tokens=[[ids.tolist() for ids in row] for row in decoded.ids],
        ended=decoded.ended,
        score=yardstick.scores(texts, decoded.ids),
        kl=kl,
        kl_low=kl_low,
        logp=decoded.logp,
        reference_logp=reference_logp,
        entropy=decoded.entropy,
        sampled=decoded.tokens,
        reward_calls=decoded.reward_calls,
    )


def listed_law(config: DecodeConfig, listed: Listed) -> dict[str, Array] | None:
    """Exact score and KL per prompt [P] of a decoder of the listed reference that goes by the
    listed rewards; None where its law is not known.
    """
    shaped = any(getattr(config, name) != type(config).model_fields[name].default for name in SHAPE)
    if config.method not in LAWS or config.rewards or shaped:
        return None
    rewards = listed.rewards
    score = []
    kl = []
    for logps in listed.reference:
        reference = logps.double().exp()
        law = LAWS[config.method](config, reference / reference.sum(), rewards)
        score.append(float(law @ rewards))
        live = law > 0
        kl.append(float((law[live] * (law[live].log() - logps.double()[live])).sum()))
    return {"score": np.array(score), "kl": np.array(kl)}
