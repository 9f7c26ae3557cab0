"""What stands in a row and is not read is counted, with a warning."""

import pytest

from alignkit.data import DataConfig, load_bundles


def row(**changes):
    return {"prompt": "hello", "chosen": " world", "rejected": " there"} | changes


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({"question": "Who?"}, 1),
        ({"messages": [{"role": "user", "content": "Who?"}]}, 1),
        ({"question": "I said"}, 0),  # both completions begin with it
        ({"source": "a forum"}, 0),
    ],
)
def test_a_prompt_beside_an_implicit_pair_is_not_left_out_in_silence(kinds, changes, unread):
    rows = [{"chosen": "I said hello world", "rejected": "I said hello there"} | changes]
    report = load_bundles(DataConfig(), "pair", kinds["metaspace"], source=rows)[1]
    assert report.count("prompt_unread") == unread


def test_images_beside_the_text_are_not_left_out_in_silence(kinds):
    rows = [row(images=["a.png"]), row(prompt="the", images=None), row(prompt="cat", images=[])]
    report = load_bundles(DataConfig(), "pair", kinds["metaspace"], source=rows)[1]
    assert report.findings["media_unread"].rows == [1]
