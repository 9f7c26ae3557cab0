"""Iterative decoding with a verifier: a wrong answer is called wrong, and the policy tries again.

    python examples/verdicts.py

The environment's observation is the verdict alone. A policy that reads it can leave out what was wrong
already; one that does not read it gets as far as best-of-n with the same verifier, and the example
prints both for a small model that adds numbers.
"""

from typing import Any

from alignkit.tasks.arithmetic import answer


class Verdicts:
    """The environment, in TRL's form: reward 1 for an answer that the verifier accepts, within
    `tries` turns, less `price` for every verdict before it.
    """

    tries = 4
    price = 0.0
    wrong = "="  # the verdict, in words that the model knows: the sum stands open again

    def reset(self, prompt: str, **row: Any) -> None:
        """A new question."""
        self.prompt = prompt
        self.tried = 0

    def step(self, text: str) -> tuple[str, float, bool]:
        """The verdict on a turn: (words, reward, done)."""
        self.tried += 1
        if self.accepts(text):
            return "", 1.0, True
        if self.tried == self.tries:
            return "", 0.0, True
        return self.wrong, -self.price, False

    def state(self) -> str:
        """How many answers were wrong so far."""
        return str(self.tried)

    def accepts(self, text: str) -> bool:
        """The verifier: whether a turn answers the prompt. A world of your own overrides it."""
        return text == answer(self.prompt)


def main(prompts: int = 100) -> dict[str, float]:
    """Print and return the share of sums that are solved with verdicts, and by the best of as many
    answers that know nothing of each other.
    """
    from alignkit.rollout.environment_pool import LocalEnvironments
    from alignkit.rollout.generate import generate
    from alignkit.rollout.play import play
    from alignkit.runs.trained_model import load_finished
    from alignkit.tasks import resolve

    task = resolve("arithmetic")
    model = load_finished(str(task.model_folder))
    sums = [row["prompt"] for row in task.rows("rollout", "eval")][:prompts]

    worlds = LocalEnvironments(Verdicts)
    rows = play(model, sums, worlds, completions=1, turns=Verdicts.tries, max_new_tokens=32)
    alone = generate(model, sums, completions=Verdicts.tries, max_new_tokens=5)
    share = {
        "with verdicts": sum(row[0].reward for row in rows) / len(sums),
        "best of n": sum(answer(s) in texts for s, texts in zip(sums, alone)) / len(sums),
    }
    for name, value in share.items():
        print(f"{name}: {value:.0%} of {len(sums)} sums solved in {Verdicts.tries} answers")
    return share


if __name__ == "__main__":
    main()
