"""Where the prompt ends, BOS once, EOS at most once, the cut: against the tokenizer's own joint
encoding.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignkit.data import DataConfig, fingerprint, load_bundles, load_prompts
from alignkit.errors import DataError, ModelError

TEXT = st.text(alphabet="abehlost \n,:.?1<>/sé", min_size=1, max_size=12) | st.sampled_from(
    ["hello", " world", "The cat", " hel", "lo"]
)
NAMES = ["byte_level", "metaspace", "word_level", "both_ends", "stories"]


@pytest.fixture(scope="module")
def tokenizers(kinds, shared):
    return kinds | {"stories": AutoTokenizer.from_pretrained(shared / "stories260k")}


def bundles(tokenizer, rows, family="pair", **options):
    return load_bundles(DataConfig(**options), family, tokenizer, source=rows)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def encode(tokenizer, text):
    """The tokenizer's own ids, without the EOS that some add."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id] else ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(prompt=st.just("") | TEXT, chosen=TEXT, rejected=TEXT)
def test_prompt_and_completion_are_the_joint_tokenisation(
    tokenizers, name, prompt, chosen, rejected
):
    tokenizer = tokenizers[name]
    try:
        [bundle], report = bundles(tokenizer, [pair(prompt, chosen, rejected)])
    except DataError:  # equal or blank completions, or no token of their own
        joint = [encode(tokenizer, prompt + text) for text in (chosen, rejected)]
        blank = (
            not chosen.strip()
            or not rejected.strip()
            or len(encode(tokenizer, prompt)) >= min(map(len, joint))
        )
        assert blank or joint[0] == joint[1]
        return
    alone = encode(tokenizer, prompt)
    joint = [
        [*encode(tokenizer, prompt + text), tokenizer.eos_token_id] for text in (chosen, rejected)
    ]
    start = bundle.prompt.tolist()
    if report.count("empty_prompt"):
        start = []
        assert bundle.prompt.tolist() == [
            tokenizer.eos_token_id if tokenizer.bos_token is None else tokenizer.bos_token_id
        ]
    for ids, expected, mask in zip(bundle.completions, joint, bundle.masks):
        assert start + ids.tolist() == expected
        assert mask.all()
        assert len(mask) == len(ids)
    assert start == alone[: len(start)]  # never longer than the prompt alone
    following = {tuple(ids[len(start) : len(start) + 1]) for ids in [alone, *joint]}
    assert len(start) == len(alone) or len(following) > 1  # and the longest that all of them share


def test_a_merge_across_the_end_of_the_prompt_belongs_to_the_completions(kinds):
    tokenizer = kinds["byte_level"]
    assert tokenizer.tokenize("hello") == ["hello"]
    [bundle], report = bundles(tokenizer, [pair("the hel", "lo world", "ping")])
    assert tokenizer.decode(bundle.prompt) == "the"
    assert [tokenizer.decode(ids) for ids in bundle.completions] == [
        " hello world<|endoftext|>",
        " helping<|endoftext|>",
    ]
    assert report.count("boundary") == 1


def test_a_sentencepiece_space_belongs_to_the_completion(kinds):
    tokenizer = kinds["metaspace"]
    [bundle], _ = bundles(tokenizer, [pair("hello ", "world", "there")])
    assert tokenizer.convert_ids_to_tokens(bundle.prompt.tolist()) == ["<s>", "▁hello"]
    assert tokenizer.convert_ids_to_tokens(bundle.completions[0].tolist()) == ["▁world", "</s>"]


def test_the_implicit_prompt_is_what_both_texts_share(kinds):
    tokenizer = kinds["word_level"]
    rows = [{"chosen": "hello world the cat sat", "rejected": "hello world the mat"}]
    [bundle], _ = bundles(tokenizer, rows)
    assert tokenizer.decode(bundle.prompt) == "hello world the"
    assert [tokenizer.convert_ids_to_tokens(i.tolist()) for i in bundle.completions] == [
        ["cat", "sat", "</s>"],
        ["mat", "</s>"],
    ]
    [bundle], _ = bundles(tokenizer, [{"chosen": "hello world", "rejected": "hello world the"}])
    assert [tokenizer.convert_ids_to_tokens(i.tolist()) for i in bundle.completions] == [
        ["</s>"],
        ["the", "</s>"],
    ]
    [bundle], _ = bundles(tokenizer, rows, family="sequence")
    assert tokenizer.convert_ids_to_tokens(bundle.completions[0].tolist()) == ["cat", "sat", "</s>"]
    assert len(bundle.completions) == 1


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "both_ends"])
def test_bos_and_eos_come_once(kinds, name):
    tokenizer = kinds[name]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    [bundle], report = bundles(
        tokenizer, [{"prompt": f"{bos}hello", "completion": f" world{eos}"}], family="sequence"
    )
    ids = [*bundle.prompt.tolist(), *bundle.completions[0].tolist()]
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (
        (2, 2) if bos == eos else (1, 1)
    )
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert report.count("special_tokens") == 1
    assert report.count("bos_once") == (name != "byte_level")


def test_append_eos_can_be_turned_off_and_needs_an_eos(kinds):
    tokenizer = kinds["metaspace"]
    rows = [{"prompt": "hello", "completion": " world"}]
    for setting, expected in (("auto", True), (True, True), (False, False)):
        [bundle], _ = bundles(tokenizer, rows, family="sequence", append_eos=setting)
        assert (bundle.completions[0][-1] == tokenizer.eos_token_id) == expected
    bare = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(ModelError, match="no EOS token"):
        bundles(bare, rows, family="sequence", append_eos=True)
    [bundle], _ = bundles(bare, rows, family="sequence")
    assert tokenizer.decode(bundle.completions[0]).strip() == "world"


def test_special_tokens_in_the_text_can_be_read_as_characters(kinds):
    tokenizer = kinds["metaspace"]
    rows = [{"prompt": "hello", "completion": " a</s>b"}]
    [read], report = bundles(tokenizer, rows, family="sequence")
    [plain], quiet = bundles(tokenizer, rows, family="sequence", split_special_tokens=True)
    assert tokenizer.eos_token_id in read.completions[0][:-1]
    assert tokenizer.eos_token_id not in plain.completions[0][:-1]
    assert (report.count("special_tokens"), quiet.count("special_tokens")) == (1, 0)
    assert "data.split_special_tokens=true" in report.warnings()[0]


def test_the_cut_keeps_the_start_and_counts(kinds):
    tokenizer = kinds["word_level"]
    long, short = "the cat sat on the mat", "the mat"
    rows = (
        [pair("hello world ", long, short)]
        + [pair("hello ", short, "cat")] * 3
        + [pair(long, " cat", " mat")]
    )
    made, report = bundles(tokenizer, rows, max_length=6)
    assert [[len(b.prompt), *map(len, b.completions)] for b in made] == [[2, 4, 3]] + [
        [1, 3, 2]
    ] * 3
    assert tokenizer.eos_token_id not in made[0].completions[0]  # a cut completion has not ended
    assert report.findings["truncated"].rows == [1]
    assert report.findings["overlong"].rows == [5]
    assert (report.total, report.usable) == (5, 4)
    # 20 % of the rows: above the 5 % that are passed over
    assert "truncated: 1 row (1)" in "\n".join(report.warnings())
    _, report = bundles(tokenizer, rows + [pair("hello ", short, "cat")] * 40, max_length=6)
    assert not any("truncated" in line for line in report.warnings())
    with pytest.raises(
        DataError, match="chosen equals rejected in 100%"
    ):  # equal as far as the cut goes
        bundles(tokenizer, [pair("hello ", "the cat sat", "the cat on")], max_length=3)


def test_rows_beyond_the_models_context_are_counted(kinds, monkeypatch):
    tokenizer = kinds["word_level"]
    monkeypatch.setattr(tokenizer, "model_max_length", 4)
    rows = [pair("hello ", "the cat sat on", "the mat"), pair("hello ", "cat", "mat")]
    _, report = bundles(tokenizer, rows)
    assert report.findings["beyond_context"].rows == [1]
    assert not bundles(tokenizer, rows, max_length=4)[1].count("beyond_context")


def test_an_empty_prompt_becomes_bos_or_eos_or_is_refused(kinds):
    for name, stands in (
        ("byte_level", "<|endoftext|>"),
        ("metaspace", "<s>"),
        ("word_level", "</s>"),
    ):
        [bundle], report = bundles(kinds[name], [pair("", "cat", "mat")])
        assert kinds[name].convert_ids_to_tokens(bundle.prompt.tolist()) == [stands]
        # which adds BOS by itself
        assert ("stands in for it" in "\n".join(report.lines())) == (name != "metaspace")
    bare = type(kinds["word_level"])(tokenizer_object=kinds["word_level"]._tokenizer)
    with pytest.raises(DataError, match="neither BOS nor EOS to stand in"):
        bundles(bare, [pair("", "cat", "mat")])


def test_text_and_labels(kinds):
    [bundle], _ = bundles(kinds["metaspace"], [{"text": "hello world"}], family="sequence")
    assert kinds["metaspace"].convert_ids_to_tokens(bundle.prompt.tolist()) == ["<s>"]
    rows = [
        {"prompt": "hello", "completion": " world", "label": label} for label in (True, 0, "false")
    ]
    made, report = bundles(kinds["metaspace"], rows, family="labelled")
    assert [b.rows["label"].tolist() for b in made] == [[True], [False], [False]]
    assert report.format == "labelled"


def test_prompts_for_online_objectives_keep_the_other_columns(kinds):
    rows = [
        {"prompt": "hello world", "answer": "42"},
        {"prompt": ""},
        {"prompt": "the cat sat on the mat"},
    ]
    prompts, report = load_prompts(DataConfig(max_length=5), kinds["word_level"], source=rows)
    assert [(p.uid, p.text, dict(p.columns)) for p in prompts] == [
        ("rows:1", "hello world", {"answer": "42"}),
        ("rows:2", "", {}),
    ]
    assert [p.ids.dtype for p in prompts] == [torch.int64] * 2
    assert prompts[1].ids.tolist() == [kinds["word_level"].eos_token_id]
    assert report.findings["overlong"].rows == [3]
    assert report.count("empty_prompt") == 1


def test_fingerprint_depends_on_tokens_order_and_masks(kinds):
    rows = [pair("hello", " world", " there"), pair("the", " cat", " mat")]
    made, again = (bundles(kinds["byte_level"], rows)[0] for _ in range(2))
    assert fingerprint(made) == fingerprint(again)
    other = bundles(kinds["byte_level"], rows, append_eos=False)[0]
    assert (
        len({fingerprint(made), fingerprint(made[::-1]), fingerprint(made[:1]), fingerprint(other)})
        == 4
    )


def test_real_pairs(tokenizers, shared):
    config = DataConfig(train=str(shared / "stories_sentiment" / "preferences_train.jsonl"))
    made, report = load_bundles(config, "pair", tokenizers["stories"])
    assert (report.total, report.usable, len(made)) == (2101, 2101, 2101)
    assert not report.findings
    assert made[16].uid == "preferences_train.jsonl:17"
    config = DataConfig(train=str(shared / "gsm8k" / "preferences_train.jsonl"), max_length=512)
    made, report = load_bundles(config, "pair", tokenizers["stories"])
    assert len(made) == report.usable == 1704
    assert all(
        b.prompt[0] == 1 and max(len(b.prompt) + len(c) for c in b.completions) <= 512 for b in made
    )
    assert report.count("truncated") == 247
