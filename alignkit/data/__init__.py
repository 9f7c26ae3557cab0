"""From rows to bundles. A row takes this way, and each step is one file:

    read.py        rows of a file, a saved dataset, a hub name or a list
    formats.py     which format the columns have, and which formats an objective can use
    messages.py    what a text and a list of messages must look like
    examples.py    a checked example: a prompt and its completions
    chat.py        conversations as text, through the chat template
    encode.py      text as token ids, with BOS and EOS
    tokenise.py    examples as bundles: where the prompt ends, which tokens are trained, the cut
    prompts.py     examples as prompts, for objectives that sample their completions
    verdicts.py    everything that can be wrong with a row
    report.py      how often each verdict was given, on which rows
    checking.py    all rows of a source, part by part
    stored.py      bundles in a file that is mapped into memory
    cache.py       where these files lie, so that many rows are tokenised once
    mixture.py     several sources as one data set: how many rows of each an epoch has
    load.py        all of the above in order: load_bundles, load_prompts, load_mixture, check

Names load when they are used: importing the folder imports neither torch nor datasets.
"""

from importlib import import_module

_LAZY = {
    "DataConfig": "alignkit.config.data",
    "Report": "alignkit.data.report",
    "Prompt": "alignkit.data.prompts",
    "load_bundles": "alignkit.data.load",
    "load_prompts": "alignkit.data.load",
    "load_mixture": "alignkit.data.load",
    "check": "alignkit.data.load",
    "fingerprint": "alignkit.data.load",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"alignkit.data has no {name!r}; it has {', '.join(__all__)}")
