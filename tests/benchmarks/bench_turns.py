"""Episodes of several turns beside single answers of the same number of own tokens, in turn, in one
process.

    python tests/benchmarks/bench_turns.py [--episodes 64] [--turns 4] [--own 32] [--heard 12]
    [--prompt 64] [--size 15M]

Every turn has `--own` tokens and the world says `--heard` tokens after it; a single answer has
`turns * own` tokens. So what episodes cost more is reading the world's words, and beginning and
ending the batch of each turn. The table goes to stdout as Markdown.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from world import SHAPES, write_model

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.config.plugins import load_object
from alignkit.data.prompts import Prompt
from alignkit.rollout.environment_pool import Environments, LocalEnvironments, WorkerEnvironments
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.renderer import TextRenderer
from alignkit.rollout.turns import TurnSampler

END = 1e4  # added to the end token's logit where a turn has to end


# A file of its own: processes that play in it import neither torch nor this one.
WORLD = """
class World:
    def reset(self, words, **row):
        self.words = words

    def step(self, text):
        return self.words, 0.0, False
"""


class Clock:
    """Makes a model end a turn with its `every`-th token: a hook that counts its forwards, of which
    those with several tokens begin a turn.
    """

    def __init__(self, network: torch.nn.Module, end: int) -> None:
        self.every = 0  # never
        self.end = end
        self.drawn = 0
        network.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module: object, args: object, inputs: dict, output: object) -> None:
        """The end token becomes certain at the last token of a turn, impossible before."""
        self.drawn = 1 if inputs["input_ids"].shape[1] > 1 else self.drawn + 1
        output.logits[..., self.end] = END if self.drawn == self.every else -END


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--own", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--heard", type=int, default=12, help="tokens that the world says")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=4)
    asked = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        report(write_model(Path(folder), asked.size, asked.vocab), asked)


def report(folder: Path, asked: argparse.Namespace) -> None:
    """Time single answers and episodes in turn and print the table."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    models = OneModel(network, words(asked.vocab))
    clock = Clock(network, models.tokenizer.eos_token_id)
    prompts = prompts_of(asked)
    own = asked.turns * asked.own
    sampler = HFSampler(models, max_new_tokens=own)

    def answers(step: int) -> None:
        clock.every = 0
        ids = [prompt.ids for prompt in prompts]
        rows = sampler.sample(ids, Draw(1), step=step, prompt_ids=range(len(ids)))
        assert {len(sample.ids) for row in rows for sample in row} == {own}

    def episodes_in(environments: Environments) -> Callable[[int], None]:
        cap = own + asked.turns * asked.heard + 1
        player = TurnSampler(
            HFSampler(models, max_new_tokens=cap),
            environments,
            TextRenderer(models.tokenizer, DataConfig()),
            turns=asked.turns,
            max_new_tokens=cap,
            context=4096,
            seed=0,
        )

        def play(step: int) -> None:
            clock.every = asked.own
            rows = player.episodes(prompts, Draw(1), step=step, prompt_ids=range(len(prompts)))
            assert {episode.own_tokens for row in rows for episode in row} == {own}

        return play

    (folder / "a_world.py").write_text(WORLD)
    spec = f"{folder / 'a_world.py'}:World"
    here = LocalEnvironments(load_object(spec, what="environment"))
    apart = WorkerEnvironments(spec)
    seconds = timed([answers, episodes_in(here), episodes_in(apart)], asked.repeats)
    apart.close()

    print(
        f"\n{asked.episodes} episodes of {asked.turns} turns of {asked.own} tokens, with "
        f"{asked.heard} tokens heard between them, after prompts of {asked.prompt}; {asked.size} "
        f"Llama, vocabulary {asked.vocab}, {torch.get_num_threads()} threads, medians of "
        f"{asked.repeats}\n\n| | seconds | ratio | CPU seconds | ratio |\n|---|---|---|---|---|"
    )
    names = (f"answers of {own} tokens", "episodes", "episodes, worlds in processes of their own")
    first = medians(seconds[0])
    for name, times in zip(names, seconds, strict=True):
        cells = [f"{own:.2f} | {own / base:.2f}" for own, base in zip(medians(times), first)]
        print(f"| {name} | {' | '.join(cells)} |")


def medians(times: list[tuple[float, float]]) -> list[float]:
    """Of the seconds on the clock and of this process's CPU seconds."""
    return [statistics.median(column) for column in zip(*times, strict=True)]


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` words."""
    tokens = {name: place for place, name in enumerate(["<pad>", "<s>", "</s>"])}
    tokens |= {f"w{place}": place for place in range(3, vocab)}
    inner = Tokenizer(WordLevel(tokens, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def prompts_of(asked: argparse.Namespace) -> list[Prompt]:
    """Prompts of random tokens; the world says as many words as it should say tokens."""
    made = torch.Generator().manual_seed(0)
    return [
        Prompt(
            torch.randint(3, asked.vocab, (asked.prompt,), generator=made),
            "a sum",
            f"prompt {number}",
            {"words": " w5" * asked.heard},
        )
        for number in range(asked.episodes)
    ]


def timed(ways: list[Callable[[int], None]], repeats: int) -> list[list[tuple[float, float]]]:
    """Seconds, on the clock and of the CPU, of each repeat of each way, in turn; a first one is
    left out.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in ways]
    for step in range(repeats + 1):
        for times, act in zip(seconds, ways):
            began, cpu = time.perf_counter(), time.process_time()
            act(step)
            times.append((time.perf_counter() - began, time.process_time() - cpu))
    return [times[1:] for times in seconds]


if __name__ == "__main__":
    main()
