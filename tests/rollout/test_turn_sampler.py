"""Episodes of several turns: what is the policy's own, whose noise it is, where an episode ends."""

import pytest
import torch
from episode_worlds import DoneAtOnce, Echo, loaded, player, prompts
from world import save_model

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.errors import ConfigError, DataError
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.renderer import ChatRenderer, TextRenderer

EOS = 2
CHAT = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)
FORGETFUL = CHAT.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'w9' }}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return loaded(save_model(tmp_path_factory.mktemp("model")))


def play(models, environment=Echo, n=3, count=4, numbers=None, **settings):
    return player(models, environment, **settings).episodes(
        prompts(n), Draw(count), step=5, prompt_ids=numbers or range(n)
    )


def tensors(episode):
    return [
        getattr(segment, name)
        for segment in episode.segments
        for name in ("prompt", "ids", "mask", "turns", "states", "rewards")
    ]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_an_environment_that_is_done_at_once_gives_todays_samples_bit_for_bit(models):
    rows = play(models, DoneAtOnce)
    sampler = HFSampler(models, max_new_tokens=60)
    drawn = sampler.sample([p.ids for p in prompts(3)], Draw(4), step=5, prompt_ids=range(3))
    for episodes, samples in zip(rows, drawn, strict=True):
        for episode, sample in zip(episodes, samples, strict=True):
            (segment,) = episode.segments
            assert torch.equal(segment.ids, sample.ids)
            assert torch.equal(segment.logps, sample.logps)
            assert segment.mask.all()
            assert episode.ended == sample.ended
            fives = int((sample.ids == 5).sum()) if sample.ended else 0
            assert episode.reward == fives


def test_own_tokens_are_the_samplers_and_foreign_tokens_the_environments(models):
    rows = play(models)
    several = [e for row in rows for e in row if e.turns > 1]
    assert len(several) > 4
    for episode in several:
        (segment,) = episode.segments
        assert segment.mask[-1]  # an episode never ends in foreign tokens
        assert (segment.turns == -1).equal(~segment.mask)
        assert segment.logps[~segment.mask].eq(0).all()
        for turn in range(episode.turns):
            own = segment.ids[segment.turns == turn]
            said = models.tokenizer.decode(own, skip_special_tokens=True)
            assert episode.messages[2 * turn]["content"] == said
            if turn + 1 < episode.turns:
                assert own[-1] == EOS  # and what follows is not its own
                place = int((segment.turns == turn).nonzero()[-1]) + 1
                words = said.split() or ["w3"]
                heard = models.tokenizer.decode(segment.ids[place : place + 2])
                assert heard.split() == [words[-1], "w7"]


def test_the_log_probs_of_own_tokens_are_those_of_one_forward_pass(models):
    for episode in (e for row in play(models) for e in row):
        (segment,) = episode.segments
        whole = torch.cat([segment.prompt, segment.ids])
        with torch.no_grad():
            logprobs = models.network(whole[None]).logits[0, :-1].log_softmax(-1)
        wanted = logprobs.gather(-1, whole[1:, None])[len(segment.prompt) - 1 :, 0]
        assert (segment.logps - wanted)[segment.mask].abs().max() < 1e-5


def test_rewards_stand_at_the_last_own_token_of_their_turn_and_states_at_all_of_them(models):
    for episode in (e for row in play(models) for e in row):
        (segment,) = episode.segments
        for turn in range(episode.turns):
            here = segment.turns == turn
            fives = int((segment.ids[here] == 5).sum())
            answered = turn + 1 < episode.turns or episode.ended
            assert segment.rewards[here].sum() == segment.rewards[here][-1]
            assert segment.rewards[here][-1] == (fives if answered else 0)
            assert segment.states[here].unique().numel() == 1
    rows = play(models)
    firsts = {int(e.segments[0].states[0]) for row in rows for e in row}
    assert len(firsts) == 1  # the state is the world's, not the prompt's


def test_neither_order_nor_batches_nor_the_number_of_processes_change_an_episode(models):
    every = play(models, n=4)
    backwards = player(models, Echo).episodes(
        prompts(4)[::-1], Draw(4), step=5, prompt_ids=[3, 2, 1, 0]
    )
    second_of_two_processes = player(models, Echo).episodes(
        prompts(4)[1::2], Draw(4), step=5, prompt_ids=[1, 3]
    )
    one_at_a_time = play(models, n=4, budget=1)
    for row, other in zip(every, backwards[::-1], strict=True):
        assert all(same(a, b) for a, b in zip(row, other, strict=True))
    for row, other in zip(every[1::2], second_of_two_processes, strict=True):
        assert all(same(a, b) for a, b in zip(row, other, strict=True))
    for row, other in zip(every, one_at_a_time, strict=True):
        assert all(same(a, b) for a, b in zip(row, other, strict=True))


def test_turns_see_noise_of_their_own_completion_and_position(tmp_path):
    """Under a uniform law the tokens are the noise: equal noise would give equal turns."""
    models = loaded(save_model(tmp_path))
    torch.nn.init.zeros_(models.network.lm_head.weight)
    (row,) = play(models, n=1, count=8, turns=3, cap=100)
    turns = [
        tuple(segment.ids[segment.turns == turn].tolist())
        for episode in row
        for segment in episode.segments
        for turn in range(episode.turns)
    ]
    beginnings = [turn[:4] for turn in turns if len(turn) >= 4]
    assert len(beginnings) > 8
    assert len(set(beginnings)) == len(beginnings)


def test_a_reused_instance_plays_the_same_episode_as_a_fresh_one(models):
    used = player(models, Echo)
    first = used.episodes(prompts(3), Draw(4), step=5, prompt_ids=range(3))
    used.episodes(prompts(2), Draw(3), step=6, prompt_ids=range(2))
    again = used.episodes(prompts(3), Draw(4), step=5, prompt_ids=range(3))
    assert all(same(a, b) for row, other in zip(first, again) for a, b in zip(row, other))


@pytest.mark.parametrize(("turns", "cap"), [(1, 60), (2, 60), (8, 20), (8, 3)])
def test_an_episode_keeps_within_its_turns_and_its_cap(models, turns, cap):
    for episode in (e for row in play(models, turns=turns, cap=cap) for e in row):
        assert 1 <= episode.turns <= turns
        assert episode.tokens <= cap
        assert episode.segments[-1].mask[-1]


def test_texts_that_differ_inside_a_group_are_an_error(models):
    class Moody(Echo):
        count = 0

        def reset(self, **row):
            super().reset()
            Moody.count += 1
            return f" w{3 + Moody.count}"

    with pytest.raises(DataError, match=r"row 0: .* different texts, ' w4' and ' w5'"):
        play(models, Moody)


def test_what_reset_says_is_part_of_the_prompt(models):
    class Greeting(Echo):
        def reset(self, n, **row):
            super().reset()
            return f" w{10 + n}"

    rows = play(models, Greeting)
    for n, row in enumerate(rows):
        assert all(e.segments[0].prompt.tolist() == [3 + n, 4, 10 + n] for e in row)
        assert row[0].prompt == f"w{3 + n} w4 w{10 + n}"


def test_an_episode_whose_environment_fails_is_set_aside_with_the_reason(models):
    class Fragile(Echo):
        def step(self, text):
            if "w5" in text.split():
                raise RuntimeError("no fives please")
            return super().step(text)

    rows = play(models, Fragile, n=4)
    failed = [e for row in rows for e in row if e.failed]
    assert 0 < len(failed) < 16
    assert failed[0].failed == "step: RuntimeError: no fives please"
    assert all(not e.segments and e.reward == 0 for e in failed)


def chats(models, template, environment=Echo, **settings):
    models.tokenizer.chat_template = template
    try:
        renderer = ChatRenderer(models.tokenizer, DataConfig(), stops=[EOS])
        given = prompts(3)
        for prompt in given:
            prompt.text = [{"role": "user", "content": prompt.text}]
            prompt.ids = renderer.start(prompt.text)
        return renderer, player(
            models, environment, renderer=renderer, cap=100, **settings
        ).episodes(given, Draw(4), step=5, prompt_ids=range(3))
    finally:
        models.tokenizer.chat_template = None


def test_a_template_that_repeats_history_gives_one_segment_that_reads_like_the_whole_chat(models):
    renderer, rows = chats(models, CHAT)
    assert not renderer.rewrites
    for number, episode in enumerate(e for row in rows for e in row):
        (segment,) = episode.segments
        row = number // 4
        said = [{"role": "user", "content": f"w{3 + row} w4"}, *episode.messages]
        models.tokenizer.chat_template = CHAT
        whole = models.tokenizer.apply_chat_template(said, return_dict=False)
        models.tokenizer.chat_template = None
        ids = torch.cat([segment.prompt, segment.ids]).tolist()
        special = {0, 1}  # what the policy draws of these does not survive decoding
        assert [i for i in ids if i not in special] == whole[: len(whole) - (not episode.ended)]


def test_a_template_that_rewrites_history_gives_segments_in_the_contexts_they_were_drawn_in(models):
    renderer, rows = chats(models, FORGETFUL)
    assert renderer.rewrites
    several = [e for row in rows for e in row if e.turns > 1]
    assert several
    for episode in several:
        assert len(episode.segments) == episode.turns
        first, second = episode.segments[:2]
        heard = models.tokenizer.encode(episode.messages[1]["content"])
        assert second.prompt.tolist() == [*first.prompt.tolist(), 9, EOS, 3, *heard, EOS, 4]
        assert all(segment.mask.all() for segment in episode.segments)
        turns = [segment.turns.unique().tolist() for segment in episode.segments]
        assert turns == [[i] for i in range(episode.turns)]
        for segment in episode.segments:
            whole = torch.cat([segment.prompt, segment.ids])
            with torch.no_grad():
                logprobs = models.network(whole[None]).logits[0, :-1].log_softmax(-1)
            wanted = logprobs.gather(-1, whole[1:, None])[len(segment.prompt) - 1 :, 0]
            assert (segment.logps - wanted).abs().max() < 1e-5


class Forgetting(Echo):
    """Before the third turn everything that was said is replaced by w11; the fourth goes on from it."""

    def step(self, text):
        words, reward, done = super().step(text)
        return "" if self.turn == 2 else words, reward, done

    def context(self):
        return " w11" if self.turn == 2 else None


def test_an_environment_may_say_what_is_read_in_place_of_what_was_said(models):
    """Also under a template that rewrites history, where it is the beginning of the later turns."""
    whole = [e for row in play(models, Forgetting, count=12) for e in row if e.turns == 4]
    assert whole
    for episode in whole:
        first, second = episode.segments
        assert second.prompt.tolist() == [*first.prompt.tolist(), 11]
        assert first.turns.unique().tolist() == [-1, 0, 1]
        assert second.turns.unique().tolist() == [-1, 2, 3]
        assert (second.turns == -1).equal(~second.mask)
        tokens = torch.cat([second.prompt, second.ids])
        with torch.no_grad():
            logprobs = models.network(tokens[None]).logits[0, :-1].log_softmax(-1)
        wanted = logprobs.gather(-1, tokens[1:, None])[len(second.prompt) - 1 :, 0]
        assert (second.logps - wanted)[second.mask].abs().max() < 1e-5

    renderer, rows = chats(models, FORGETFUL, Forgetting)
    assert renderer.rewrites
    whole = [e for row in rows for e in row if e.turns == 4]
    assert whole
    for episode in whole:
        first, _, third, fourth = (segment.prompt.tolist() for segment in episode.segments)
        begun = [*first[:-2], 11, EOS, 4]
        heard = models.tokenizer.encode(episode.messages[5]["content"])
        assert third == begun
        assert fourth == [*begun, 9, EOS, 3, *heard, EOS, 4]


def test_words_beside_what_is_read_in_their_place_are_refused(models):
    class Both(Echo):
        def context(self):
            return " w11"

    episodes = [e for row in play(models, Both) for e in row]
    failed = [e.failed for e in episodes if e.failed]
    assert failed
    assert all("give one of them" in reason for reason in failed)


def test_a_template_without_tools_is_refused(models):
    models.tokenizer.chat_template = CHAT
    schema = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    with pytest.raises(ConfigError, match="leaves out calls of tools"):
        ChatRenderer(models.tokenizer, DataConfig(), [schema], [EOS])
    models.tokenizer.chat_template = None


def test_plain_text_follows_the_end_token_as_it_is(models):
    renderer = TextRenderer(models.tokenizer, DataConfig())
    assert renderer.follow([{"role": "user", "content": " w5 w6"}]).tolist() == [5, 6]
    assert renderer.start("w5 w6").tolist() == [5, 6]
