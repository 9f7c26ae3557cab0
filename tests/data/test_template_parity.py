"""The same rows through TRL's own preparation and through alignkit's, for every chat template in TRL's
package: token ids, where the prompt ends, and what is trained are equal, or differ for a reason that
is listed here and checked. `make test-templates` prints how often each occurs.
"""

from collections import Counter

import pytest

pytest.importorskip("trl.chat_template_utils")
world = pytest.importorskip("template_world")

from template_comparison import (  # noqa: E402
    Comparison,
    Side,
    completion_messages,
    equal,
    generation_prompts,
    prepare_both,
    runs_of,
    said_by,
    theirs_of,
)

pytestmark = pytest.mark.slow  # `make test-templates`, which CI runs

REASONS = {
    "refused": "both refuse the row: the template raises (no system or developer role, no tools, "
    "roles that have to alternate), or the prompt ends with the assistant's turn, too",
    "trl_fails": "TRL fails where alignkit does not: the template joins a missing content, or "
    "arguments in the other form, or the parts of a content, and alignkit gives it what it reads",
    "no_training_template": "TRL has no training template and refuses to find the turns",
    "prefilled": "alignkit refuses a prompt that ends with the assistant's turn: the template would "
    "end that turn, and the answer would begin a second one",
    "bos": "a BOS typed in the text is doubled by TRL",
    "eos": "a tokenizer that adds EOS ends the prompt with it in TRL, and the row with two",
    "stand_in": "behind an empty prompt TRL never scores the first token; alignkit scores it behind "
    "BOS, or EOS where there is none, from which `generate` begins an empty prompt too (reported)",
    "prefix": "of two implicit texts one is the beginning of the other: TRL's prompt ends a character "
    "early, alignkit's is all that both share, and the shorter one goes on with EOS",
    "parts": "TRL hands contents in parts to the template, which writes them as a list of Python or "
    "JSON, or not at all (Qwen 3); alignkit joins them to the text that they are",
    "turns": "of several turns in a completion TRL trains the user's and the tool's too",
    "header": "TRL trains the end of the generation prompt, which the model is given and never "
    "writes: its training templates for messages (TRL itself does not for prompts and completions), "
    "and pairs where the template writes nothing between two turns of a completion (Phi 3's tools)",
    "words": "TRL's text leaves out thoughts (or words beside a call) of an earlier trained turn",
    "thought_block": "TRL's raw template writes an empty thought for the last turn alone, alignkit "
    "teaches it for every turn, as TRL does for messages",
    "opening": "the assistant opens the conversation: the template writes no empty thought before "
    "its words even when they are the last, TRL's training template does",
    "stop": "for prompts and completions TRL's template teaches no stop token (and of several turns "
    "it trains the user's)",
    "moved": "the template moves words beside a call behind the tool's answer, where no model writes "
    "them; alignkit does not train them there, and warns (words_dropped)",
    "space": "the template writes a space behind the last stop token, and alignkit trains it as the "
    "end of the turn, as TRL does for prompts and completions (and for the line break of ChatML); "
    "TRL's training template leaves it out. No sampler gets so far",
    "lost": "the template glues words beside a call to the next turn's; alignkit leaves that turn out "
    "of the loss and counts it (TRL has no training template)",
    "tool_stop": "the token with which the template opens a tool's answer behind a call is where a "
    "sampler stops, so it is trained; TRL's training template gives it to the tool",
    "cut": "alignkit ends a conversation with the last trained turn, which so gets the template's end "
    "of a conversation (EOS, a space); TRL goes on with the user's turn behind it",
}
MESSAGES = {case for case, row in world.DEMONSTRATIONS.items() if "messages" in row}
ALLOWED = {
    "pairs": {
        "header": {"calls_in_completion"},
        "trl_fails": {
            "parts",
            "calls_without_content",
            "arguments_as_text",
            "tools",
            "tool_results",
            "calls_in_completion",
        },
        "prefilled": {"prefilled"},
        "bos": {"text_with_bos"},
        "stand_in": {"text_empty_prompt"},
        "prefix": {"text_implicit_prefix"},
        "parts": {"parts"},
        "turns": {"turns_in_completion", "calls_in_completion", "implicit_early"},
    },
    "demonstrations": {
        "no_training_template": MESSAGES,
        "header": MESSAGES,
        "bos": {"text_with_bos"},
        "stand_in": {"text", "text_with_eos", "text_with_bos"},
        "turns": {"turns_in_completion"},
        "words": {"thoughts", "thoughts_beside", "words_and_calls"},
        "thought_block": {"turns_in_completion"},
        "opening": {"starts_with_assistant"},
        "stop": {"completion", "completion_several_turns", "turns_in_completion"},
        "cut": {"ends_with_user"},
        "tool_stop": {"tools"},
        "moved": {"words_and_calls"},
        "space": MESSAGES,
        "lost": {"words_and_calls"},
    },
}
THOUGHT_BLOCK = "<think>\n\n</think>\n\n"


def outcome(compared: Comparison) -> str:
    """`equal`, the reason why not, or what is not explained."""
    if compared.their_error and compared.our_error:
        return "refused"
    if compared.their_error:
        if "patching is not supported" not in str(compared.their_error):
            return "trl_fails"
        if trains_the_assistant_alone(compared, beside_calls=True):
            return "no_training_template"
        only_moved = trains_the_assistant_alone(compared, beside_calls=False)
        if compared.has_lost_turns:
            return "lost"
        return "moved" if only_moved and compared.says_words_dropped else "unexplained"
    if compared.our_error:
        ends_with_answer = "the prompt ends with an assistant turn" in str(compared.our_error)
        return "prefilled" if ends_with_answer else f"alignkit refuses: {compared.our_error}"
    if compared.every(equal):
        return "equal"
    for reason, check in CHECKS.items():
        if compared.every(lambda theirs, ours, check=check: check(compared, theirs, ours)):
            return reason
    return "unexplained"


def trains_the_assistant_alone(compared: Comparison, *, beside_calls: bool) -> bool:
    """Without TRL to compare with: all that the template writes of what the assistant says (with or
    without words beside calls) is trained, nothing that others say, and no header.
    """
    (ours,) = compared.ours
    nothing = Side(ours.ids, [False] * len(ours.ids))
    runs = [compared.text(run) for run in runs_of(ours, nothing)]
    messages = completion_messages(compared)
    others = [m["content"].strip() for m in messages if m["role"] != "assistant"]
    whole = compared.text(ours.ids)
    said = [
        part
        for m in messages
        for part in said_by(m)
        if part in whole and (beside_calls or not m.get("tool_calls"))
    ]
    headers = [prompt.rpartition("\n")[0] for prompt in generation_prompts(compared)]
    headers = [header for header in headers if header.strip()]
    return (
        bool(runs)
        and all(any(part in run for run in runs) for part in said)
        and not any(text in run for text in others for run in runs if text not in "".join(said))
        and not any(run.startswith(header) for header in headers for run in runs)
    )


def has_doubled_bos(compared: Comparison, theirs: Side, ours: Side) -> bool:
    bos = compared.tokenizer.bos_token_id
    return theirs.ids[:2] == [bos, bos] and theirs.ids[1:] == ours.ids


def has_a_stand_in(compared: Comparison, theirs: Side, ours: Side) -> bool:
    tokenizer = compared.tokenizer
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return ours.ids == [token, *theirs.ids] and all(ours.mask[1:])


def is_the_beginning_of_the_other(compared: Comparison, theirs: Side, ours: Side) -> bool:
    texts = [compared.row.get("chosen", ""), compared.row.get("rejected", "")]
    shorter, longer = sorted(map(str, texts), key=len)
    begins = bool(shorter) and "prompt" not in compared.row and longer.startswith(shorter)
    return begins and theirs.ids == ours.ids and set(ours.trained()) < set(theirs.trained())


def has_parts(compared: Comparison, theirs: Side, ours: Side) -> bool:
    """With the parts joined to a text, TRL makes the same of the row."""
    joined = {
        column: [m | {"content": "".join(part["text"] for part in m["content"])} for m in messages]
        for column, messages in compared.row.items()
        if isinstance(messages, list)
        and column in ("prompt", "chosen", "rejected")
        and isinstance(messages[0].get("content"), list)
    }
    if not joined:
        return False
    again = theirs_of(compared.kind, compared.row | joined, compared.tokenizer)
    return any(equal(side, ours) for side in again)


def trains_other_turns(compared: Comparison, theirs: Side, ours: Side) -> bool:
    """What only TRL trains holds what a user or a tool says, and nothing that the assistant says."""
    if theirs.ids != ours.ids or not set(ours.trained()) < set(theirs.trained()):
        return False
    runs = [compared.text(run) for run in runs_of(theirs, ours)]
    others = [m["content"] for m in completion_messages(compared) if m["role"] != "assistant"]
    said = [m["content"] for m in completion_messages(compared) if m["role"] == "assistant"]
    return all(any(text in run for text in others) for run in runs) and not any(
        text and text in run for text in said for run in runs if text not in " ".join(others)
    )


def trains_the_header(compared: Comparison, theirs: Side, ours: Side) -> bool:
    """What only TRL trains is in the generation prompt, directly before what both train."""
    length = len(ours.ids)
    if theirs.ids[:length] != ours.ids or any(theirs.mask[length:]):
        return False
    if not set(ours.trained()) < set(theirs.trained()):
        return False
    prompts = generation_prompts(compared)
    return all(
        any(compared.text(run) in prompt for prompt in prompts) for run in runs_of(theirs, ours)
    )


def leaves_out_words(compared: Comparison, theirs: Side, ours: Side) -> bool:
    """Something that the assistant thinks or says is trained here and not in TRL's text at all."""
    taught = compared.text([ours.ids[i] for i in ours.trained()])
    words = [part for m in completion_messages(compared) for part in said_by(m)]
    missing = [part for part in words if part not in compared.text(theirs.ids)]
    whole = all(part in taught for part in missing)
    return bool(missing) and whole and trains_the_assistant_alone(compared, beside_calls=True)


def has_more_thought_blocks(compared: Comparison, theirs: Side, ours: Side) -> bool:
    text, own = compared.text(theirs.ids), compared.text(ours.ids)
    more = own.count(THOUGHT_BLOCK) > text.count(THOUGHT_BLOCK) and without_blocks(text, own)
    return more and trains_the_assistant_alone(compared, beside_calls=True)


def has_no_opening_thought_block(compared: Comparison, theirs: Side, ours: Side) -> bool:
    text, own = compared.text(theirs.ids), compared.text(ours.ids)
    opens = compared.row.get("messages", [{"role": ""}])[0]["role"] == "assistant"
    fewer = text.count(THOUGHT_BLOCK) > own.count(THOUGHT_BLOCK) and without_blocks(text, own)
    return opens and fewer and trains_the_assistant_alone(compared, beside_calls=True)


def without_blocks(text: str, own: str) -> bool:
    return text.replace(THOUGHT_BLOCK, "") == own.replace(THOUGHT_BLOCK, "")


def has_a_stop_token(compared: Comparison, theirs: Side, ours: Side) -> bool:
    stop = compared.text(ours.ids[-1:])
    if (
        ours.ids[:-1] != theirs.ids
        or not ours.mask[-1]
        or stop not in ("<|user|>", "<|observation|>")
    ):
        return False
    before = Side(ours.ids[:-1], ours.mask[:-1])
    return equal(theirs, before) or trains_other_turns(compared, theirs, before)


def trains_where_a_tool_answers(compared: Comparison, theirs: Side, ours: Side) -> bool:
    extra = set(ours.trained()) - set(theirs.trained())
    tokens = {compared.text([ours.ids[i]]) for i in extra}
    lacking = set(theirs.trained()) - set(ours.trained())
    return ours.ids == theirs.ids and tokens == {"<|tool_response>"} and not lacking


def leaves_out_moved_words(compared: Comparison, theirs: Side, ours: Side) -> bool:
    moved = [m["content"] for m in completion_messages(compared) if m.get("tool_calls")]
    runs = [compared.text(run) for run in runs_of(theirs, ours)]
    extra = {ours.ids[i] for i in set(ours.trained()) - set(theirs.trained())}
    tokens = {compared.text([token]) for token in extra}
    return (
        ours.ids == theirs.ids
        and bool(runs)
        and set(runs) <= set(moved)
        and compared.says_words_dropped
        and (tokens <= {"<|tool_response>"})
    )


def trains_the_space_behind(compared: Comparison, theirs: Side, ours: Side) -> bool:
    """What alignkit trains beyond TRL is the space behind the last stop token."""
    end = len(ours.ids) - 1
    extra = set(ours.trained()) - set(theirs.trained())
    same = theirs.ids[: len(ours.ids)] == ours.ids and not runs_of(theirs, ours)
    stop = compared.text(ours.ids[end - 1 : end])
    return same and extra == {end} and (stop, compared.text(ours.ids[end:])) == ("</s>", " ")


def goes_on_behind_the_answer(compared: Comparison, theirs: Side, ours: Side) -> bool:
    """Without the turns behind the last answer TRL makes the same of the row."""
    messages = compared.row.get("messages", [])
    if not messages or messages[-1]["role"] == "assistant":
        return False
    shorter = Comparison(
        compared.kind, compared.name, compared.case, {"messages": messages[:-1]}, compared.tokenizer
    )
    shorter.theirs = theirs_of(shorter.kind, shorter.row, shorter.tokenizer)
    shorter.ours = [ours]
    return outcome(shorter) in ("equal", "header", "space")


CHECKS = {
    "bos": has_doubled_bos,
    "stand_in": has_a_stand_in,
    "prefix": is_the_beginning_of_the_other,
    "parts": has_parts,
    "turns": trains_other_turns,
    "header": trains_the_header,
    "space": trains_the_space_behind,
    "stop": has_a_stop_token,
    "thought_block": has_more_thought_blocks,
    "opening": has_no_opening_thought_block,
    "words": leaves_out_words,
    "moved": leaves_out_moved_words,
    "tool_stop": trains_where_a_tool_answers,
    "cut": goes_on_behind_the_answer,
}


def rows_of(kind: str) -> dict[str, dict]:
    return world.PAIRS if kind == "pairs" else world.DEMONSTRATIONS


@pytest.mark.parametrize("kind", ["pairs", "demonstrations"])
def test_every_template_gives_what_trl_gives_or_differs_for_a_reason(kind, capsys):
    counts: Counter[str] = Counter()
    problems = []
    for name in world.names():
        tokenizer = world.tokenizer_of(name)
        for case, row in rows_of(kind).items():
            reason = outcome(prepare_both(kind, name, case, row, tokenizer))
            counts[reason] += 1
            if reason in ("equal", "refused"):
                continue
            if case not in ALLOWED[kind].get(reason, ()):
                problems.append(f"{name}, {case}: {reason}")

    with capsys.disabled():
        print(f"\n{kind}: {counts['equal']} of {counts.total()} rows equal to TRL's")
        for reason, count in counts.most_common():
            if reason != "equal":
                print(f"{count:>6}  {reason}: {REASONS.get(reason, '?')}")
    assert not problems, "\n".join(problems)
    assert counts["equal"] > counts.total() / 3


def test_the_templates_that_read_parts_alone_write_no_text():
    """The reason why TRL gets parts there: a text leaves no trace in what they write."""
    tokenizer = world.tokenizer_of("qwen3")
    in_parts = [name for name in world.names() if name.startswith(world.VISION_ONLY)]
    assert len(in_parts) == len(world.VISION_ONLY)
    for name in in_parts:
        template = (world.FOLDER / f"{name}.jinja").read_text()
        try:
            text = tokenizer.apply_chat_template(
                [world.user("QQQ")], chat_template=template, tokenize=False
            )
        except Exception:  # it takes a text's characters for parts
            continue
        assert "QQQ" not in text


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_tokenizers_that_add_eos(name):
    """TRL's prompt ends with EOS, and its row has two; here a row has one, at its end."""
    tokenizer = world.tokenizer_of(name, adds_eos=True)
    eos = tokenizer.eos_token_id
    for case in ("text", "text_with_eos"):
        compared = prepare_both("pairs", name, case, world.PAIRS[case], tokenizer)
        assert all(side.ids[-2:] == [eos, eos] for side in compared.theirs)
        assert compared.every(lambda theirs, ours: ours.ids == theirs.ids[:-1])
        assert all(side.ids.count(eos) == 1 for side in compared.ours)
