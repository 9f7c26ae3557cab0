"""Parallel drafts, a summary, a refinement (PDR, Madaan et al. 2025, arXiv:2510.01123): the policy
answers several times without knowing of its other answers, writes down what it makes of them, and
answers once more, having read that alone.

    python examples/drafts.py

It is an environment whose `context` says what each turn reads, so that the context stays short
however much is drawn. To train a policy for it: rollout.environment=examples/drafts.py:Drafts and
rollout.turns=5. The example prints what three ways to sum up are worth, exactly.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

from alignkit.tasks.arithmetic import answer


class Drafts:
    """The environment, in TRL's form with `step` and `context`: reward 1 where the last answer is
    right.
    """

    drafts = 3
    between = "="  # in words that the model knows: behind each draft, and behind the summary

    def reset(self, prompt: str, **row: Any) -> None:
        """A new question."""
        self.prompt = prompt
        self.said: list[str] = []

    def step(self, text: str) -> tuple[str, float, bool]:
        """The answer to a turn: (words, reward, done)."""
        self.said.append(text)
        if len(self.said) < self.drafts + 2:
            return "", 0.0, False
        return "", float(self.accepts(text)), True

    def context(self) -> str:
        """What the next turn reads behind the question: a draft nothing, the summary all drafts, the
        refinement the summary.
        """
        if len(self.said) < self.drafts:
            return ""
        read = self.said if len(self.said) == self.drafts else self.said[-1:]
        return "".join(f"{text}{self.between}" for text in read)

    def state(self) -> str:
        """Which turn is next."""
        return str(len(self.said))

    def accepts(self, text: str) -> bool:
        """Whether the last answer is right. A world of your own overrides it."""
        return text == answer(self.prompt)


def expected_reward(
    world: Drafts, law: Mapping[str, Any], summary: Callable[[Sequence[str]], str]
) -> Any:
    """The exact mean reward in `world` of a policy that drafts by `law`, answer -> probability, sums up
    by `summary` of the drafts that it reads, and copies the summary that it reads at last.
    """
    total = 0
    for drafts in product(law, repeat=world.drafts):
        world.reset(prompt="")
        for text in drafts:
            world.step(text)
        world.step(summary(world.context().split(world.between)[:-1]))
        _, reward, _ = world.step(world.context().removesuffix(world.between))
        total += prod(law[text] for text in drafts) * Fraction(reward)
    return total


def main() -> None:
    """Print what a policy gains that gives the right answer in 4 of 10 drafts."""

    class Known(Drafts):
        """The right answer is 7."""

        def accepts(self, text: str) -> bool:
            return text == "7"

    law = {"7": 0.4, "8": 0.3, "9": 0.3}
    ways: dict[str, Callable[[Sequence[str]], str]] = {
        "the first draft": lambda drafts: drafts[0],
        "the most common": lambda drafts: Counter(drafts).most_common(1)[0][0],
        "the right one": lambda drafts: "7" if "7" in drafts else drafts[0],
    }
    print(f"{'drafts':8}{''.join(f'{name:>18}' for name in ways)}")
    for number in (1, 3, 5, 7):
        world = Known()
        world.drafts = number
        worth = [expected_reward(world, law, summary) for summary in ways.values()]
        print(f"{number:<8}{''.join(f'{value:18.3f}' for value in worth)}")


if __name__ == "__main__":
    main()
