"""A learned value as the twist: its head asked for few tokens, and rows of the models that are shared."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from number_texts import Tokens, worth
from small_models import enumerate_completions, models_of, next_logits, small_model
from torch import nn

from alignkit.config.decode import DecodeConfig
from alignkit.data.prompts import Prompt
from alignkit.decoding import particle_decoder
from alignkit.decoding.making import make_decoder
from alignkit.decoding.particle_decoder import LanguageWorld, Run
from alignkit.decoding.value import ValueHead, twists_of_likeliest
from alignkit.losses import soft_value
from alignkit.policies.bins import BinHead

POLICY = small_model(seed=1)
PROMPTS = [
    Prompt(torch.tensor([2, 3, 1]), "2 3 1", "0", {}),
    Prompt(torch.tensor([1, 2]), "1 2", "1", {}),
]
CAP = 3
BETA = 0.5


def head_of(embedding, beta=BETA, seed=0):
    """A value head whose bins are anything but uniform."""
    bins = BinHead(embedding.shape[1], 5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in bins.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=embedding.dtype)
        parameter.data = 0.3 * values
    return ValueHead(bins.eval(), embedding, low=-1.0, high=1.0, beta=beta)


def load_value(name, beta):
    network = small_model(seed=3)
    embedding = network.get_input_embeddings().weight.detach().clone()
    network.set_output_embeddings(head_of(embedding, beta))
    return SimpleNamespace(
        network=network, tokenizer=Tokens(), model=lambda _: nullcontext(network)
    )


def decoder_of(**fields):
    named = models_of(POLICY, POLICY)
    pair = SimpleNamespace(model=named.model, together=nullcontext, tokenizer=Tokens())
    config = DecodeConfig(method="smc", beta=BETA, twist="a value", every=1, **fields)
    return make_decoder(config, pair, reward=worth, max_new_tokens=CAP, load_value=load_value)


@torch.no_grad()
def test_few_tokens_have_the_values_that_the_whole_head_gives_them(monkeypatch):
    """Also where they are computed a few at a time."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(7, 8, generator=generator, dtype=torch.float64)
    head = head_of(embedding)
    laws = head.bins(hidden[:, None], embedding[None])
    exact = soft_value(laws, low=-1.0, high=1.0, beta=BETA)

    tokens = torch.randint(50, (7, 9), generator=generator)
    for at_a_time in (1 << 12, 20, 1):
        monkeypatch.setattr("alignkit.decoding.value._VALUES_AT_A_TIME", at_a_time)
        some = head.of(hidden, tokens)
        torch.testing.assert_close(some, exact.gather(-1, tokens), rtol=0, atol=1e-12)
        torch.testing.assert_close(head(hidden), exact, rtol=0, atol=1e-12)


def test_the_other_tokens_share_the_mean_of_the_likeliest():
    law = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    twists = torch.tensor([[9.0, 1.0, 7.0, 2.0]], dtype=torch.float64)
    asked = []

    def values(tokens):
        asked.append(tokens.sort().values.tolist())
        return twists.gather(-1, tokens)

    rest = ((0.4 * twists[0, 1].exp() + 0.3 * twists[0, 3].exp()) / 0.7).log()
    expected = torch.stack([rest, twists[0, 1], rest, twists[0, 3]])[None]
    torch.testing.assert_close(
        twists_of_likeliest(law.log(), values, 2), expected, rtol=0, atol=1e-12
    )
    assert asked == [[[1, 3]]]
    for count in (4, 9):
        assert torch.equal(twists_of_likeliest(law.log(), values, count), twists)


@torch.no_grad()
def test_rows_that_read_the_same_are_computed_once():
    """Laws and twists are those of each row's whole text, whatever was taken on the way."""
    decoder = decoder_of(particles=3, proposal="twist")
    with decoder.models.model("value") as network:
        assert isinstance(network.get_output_embeddings(), nn.Identity)
    whole = load_value("a value", BETA).network
    world = LanguageWorld(decoder, PROMPTS, [Run(0, 0), Run(0, 1), Run(1, 0)])
    texts = [PROMPTS[i].ids for i in (0, 0, 0, 0, 0, 0, 1, 1, 1)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        assert len(world.laws) == len({tuple(text.tolist()) for text in texts})
        laws = torch.stack([next_logits(POLICY, ids.tolist()).log_softmax(-1) for ids in texts])
        torch.testing.assert_close(world.logprobs(), laws.to(world.laws), rtol=0, atol=1e-5)
        values = torch.stack([next_logits(whole, ids.tolist()) for ids in texts]).double()
        torch.testing.assert_close(world.twists(), values, rtol=0, atol=1e-5)

        tokens = torch.randint(2, (len(texts),), generator=generator)
        drawn = values.gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(world.twist_of(tokens).double(), drawn, rtol=0, atol=1e-5)
        world.advance(tokens)
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, tokens)]
        rows = torch.randint(len(texts), (8,), generator=generator)
        world.select(rows)
        texts = [texts[row] for row in rows.tolist()]
        if len({tuple(text.tolist()) for text in texts}) < len(world.laws):
            world.advance(tokens[:8])  # rows that nobody reads any more are dropped with the next
            texts = [torch.cat([text, token[None]]) for text, token in zip(texts, tokens)]


@torch.no_grad()
def test_one_row_parts_while_another_ends():
    """Then there are as many of the models' rows as before, and yet others."""
    world = LanguageWorld(decoder_of(particles=1), PROMPTS, [Run(0, 0), Run(1, 0)])
    world.select(torch.tensor([1, 1]))
    world.advance(torch.tensor([2, 3]))
    laws = torch.stack([next_logits(POLICY, [1, 2, t]).log_softmax(-1) for t in (2, 3)])
    torch.testing.assert_close(world.logprobs(), laws.to(world.laws), rtol=0, atol=1e-5)


@pytest.mark.parametrize("proposal", ["twist", "base"])
@pytest.mark.parametrize("candidates", [2, 4])
def test_zhat_has_the_mean_z(proposal, candidates, monkeypatch):
    """E Zhat is the Z that is enumerated, with the twists of all tokens as of some."""
    monkeypatch.setattr(particle_decoder, "CANDIDATES", candidates)
    decoder = decoder_of(particles=2, proposal=proposal, fresh=0)
    law = enumerate_completions(
        lambda ids: next_logits(POLICY, ids).log_softmax(-1), PROMPTS[0].ids.tolist(), CAP
    )
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    rewards = torch.tensor(worth(None, [" ".join(map(str, ids)) for ids in law]))
    z = float((p * (rewards.double() / BETA).exp()).sum())

    runs = [Run(0, k) for k in range(2000)]
    zhat = torch.cat([o.log_z for o in decoder._outcomes(PROMPTS, runs, 0)]).exp()
    assert abs(float(zhat.mean()) - z) < 4 * float(zhat.std()) / 2000**0.5
    assert float(zhat.std()) > 0.05 * z  # the value is far from exact


def test_conditional_runs_of_one_completion_share_its_row(monkeypatch):
    """And the price of a particle with a twist is a token of both models."""
    decoder = decoder_of(particles=2, fresh=6)
    rows = []
    advance = LanguageWorld.advance

    def counted(self, tokens):
        advance(self, tokens)
        rows.append((len(tokens), len(self.laws)))

    monkeypatch.setattr(LanguageWorld, "advance", counted)
    decoded = decoder.decode(PROMPTS, 2)
    lengths = [[len(ids) for ids in row] for row in decoded.ids]
    assert (decoded.tokens >= 2 * torch.tensor(lengths).numpy()).all()
    assert (decoded.tokens <= 2 * 2 * CAP).all()
    asked, computed = rows[-1]
    assert computed < 0.7 * asked
