"""A calculator as a tool: from a policy that never calls it to one that calls it when it pays.

    python examples/agent.py

The policy adds two-digit numbers, digits in reverse, and is right less than half of the time. `=` calls
the calculator, and `=` again takes what it says. Demonstrations show how, in one of five answers.
Whether to call, the policy finds out from rewards alone: where a call is cheap, and where it is
dear. A few minutes on two cores.
"""

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit.tasks.arithmetic import answer

CALL = "="
QUIET = {"eval_every": 0, "save_every": 0, "log_samples_every": 0}


class Cheap:
    """The environment, in TRL's form. In training, alignkit runs it in processes of its own."""

    price = 0.2  # of a call; a right answer is worth 1

    def reset(self, prompt: str, **row: Any) -> None:
        """A new sum, such as `47+85=`."""
        self.right = answer(prompt)
        self.called = False

    def step(self, text: str) -> tuple[str, float, bool]:
        """The calculator's answer, or the end of the episode."""
        if text == CALL and not self.called:
            self.called = True
            return str(self.right), -self.price, False
        taken = self.called and text == CALL
        return "", float(taken or text == self.right), True


class Dear(Cheap):
    """The same calculator at a price at which a guess is worth more."""

    price = 0.95


def main(folder: str | Path | None = None, steps: int = 30) -> dict[str, float]:
    """Teach the form of a call, train at both prices, print episodes; the shares of calls by name."""
    import alignkit
    from alignkit.rollout.generate import generate
    from alignkit.runs.trained_model import load_finished
    from alignkit.tasks import resolve

    folder = Path(folder or tempfile.mkdtemp(prefix="alignkit-agent-"))
    task = resolve("arithmetic")
    sums = [row["prompt"] for row in task.rows("rollout")]
    held_out = [row["prompt"] for row in task.rows("rollout", "eval")][:100]

    base = load_finished(str(task.model_folder))
    own = [texts[0] for texts in generate(base, sums[:3000], max_new_tokens=5)]
    taught = alignkit.train(
        alignkit.SFT(),
        model=str(task.model_folder),
        data=demonstrations(sums[:3000], own, base.tokenizer.eos_token),
        output_dir=folder / "taught",
        train={"steps": 2 * steps, "batch_size": 64, "learning_rate": 2e-3, **QUIET},
    )
    share = {
        "never taught": calls("never taught", base, Cheap, held_out),
        "taught": calls("taught", load_finished(str(taught.folder)), Cheap, held_out),
    }
    for world in (Cheap, Dear):
        agent = alignkit.train(
            alignkit.RPG(beta=0.02, clip_low=None, clip_high=None),
            model=str(taught.folder / "model"),
            data=[{"prompt": prompt} for prompt in sums],
            output_dir=folder / world.__name__,
            train={"steps": steps, "batch_size": 16, "learning_rate": 1e-3, **QUIET},
            rollout={
                "environment": f"{Path(__file__).resolve()}:{world.__name__}",
                "turns": 2,
                "completions": 8,
                "max_new_tokens": 16,
            },
        )
        name = f"a call costs {world.price:g}"
        share[name] = calls(name, load_finished(str(agent.folder)), world, held_out)
    return share


def demonstrations(sums: list[str], answers: list[str], eos: str) -> list[dict[str, str]]:
    """The policy's own answers, one call in five; what the calculator says is taken."""
    chance, rows = random.Random(0), []
    for prompt, own in zip(sums, answers, strict=True):
        rows.append({"prompt": prompt, "completion": CALL if chance.random() < 0.2 else own})
        rows.append({"prompt": f"{prompt}{CALL}{eos}{answer(prompt)}", "completion": CALL})
    return [row for row in rows if row["completion"]]


def calls(name: str, models: Any, world: Callable[[], Any], sums: list[str]) -> float:
    """Print two episodes, how often the policy calls, and what it earns; returns the share of calls."""
    from alignkit.rollout.environment_pool import LocalEnvironments
    from alignkit.rollout.play import play, transcript

    worlds = LocalEnvironments(world)
    rows = play(models, sums, worlds, completions=4, turns=2, max_new_tokens=16)
    episodes = [episode for row in rows for episode in row]
    share = sum(episode.turns > 1 for episode in episodes) / len(episodes)
    reward = sum(episode.reward for episode in episodes) / len(episodes)
    print(f"\n{name}: calls in {share:.0%} of {len(episodes)} episodes, mean reward {reward:.3f}\n")
    for row in rows[:2]:
        print(transcript(row[0]) + "\n")
    return share


if __name__ == "__main__":
    main(*sys.argv[1:])
