"""Which self-play algorithm reaches the equilibrium of a cyclic preference game? Exact runs, no sampling, a few seconds on a CPU.

    python examples/nash_tabular.py --out nash_tabular.png

Ten random games of ten answers; KL to a random reference with weight beta. All algorithms ask the judge the same number of
questions (how often does each answer beat the present opponent?). EGPO and Nash-MP take the step size that theory gives, the
others the one that ends best. What to see: mirror descent, Nash-MD and the gradient methods circle and come down slowly; the
gap of the extragradient methods falls along a straight line on the logarithmic axis, by a constant factor per question.
"""

import argparse
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from alignkit.oracles.games import Game, random_games
from alignkit.oracles.self_play import ALGORITHMS, trajectory

LABELS = {
    "omd": "mirror descent",
    "nash_md": "Nash-MD",
    "online_ipo": "online IPO",
    "ipo_md": "IPO-MD (0.125)",
    "egpo": "EGPO",
    "nash_mp": "Nash-MP",
}


def step_grid(name: str, beta: float) -> torch.Tensor:
    """Step sizes to try [S, 1, 1]; one where the paper gives it."""
    if name == "egpo":
        grid = torch.tensor([2 / (1 + 2 * beta)], dtype=torch.float64)
    elif name == "nash_mp":
        grid = torch.tensor([2 * beta], dtype=torch.float64)  # the same step, in its own parametrisation
    else:
        grid = torch.logspace(-2.5, 1.5, 33, dtype=torch.float64)
        grid = grid[grid * beta <= 1]  # where the mixture, or the step towards the reference, is still one
    return grid.reshape(-1, 1, 1)


def gap_curve(game: Game, name: str, questions: int) -> tuple[torch.Tensor, float]:
    """Median duality gap over the games after each iteration at the step that ends best, and that step."""
    grid = step_grid(name, game.beta)
    iterates = trajectory(game, ALGORITHMS[name], grid, questions)  # [1 + iterations, S, games, n]
    gaps = game.gap(iterates).nan_to_num(nan=math.inf).median(-1).values  # [1 + iterations, S]
    best = int(gaps[-1].argmin())
    return gaps[:, best], float(grid[best])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="nash_tabular.png", help="the picture")
    parser.add_argument("--beta", type=float, default=0.01, help="weight of the KL to the reference")
    parser.add_argument("--questions", type=int, default=1000, help="judge questions per run")
    args = parser.parse_args()

    game = random_games(10, 10, args.beta)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    print(f"{'algorithm':<16} {'step':>8} {'questions':>10} {'gap':>10}")
    for name, label in LABELS.items():
        curve, step = gap_curve(game, name, args.questions)
        questions = torch.arange(len(curve)) * ALGORITHMS[name].queries
        print(f"{label:<16} {step:>8.3g} {int(questions[-1]):>10} {float(curve[-1]):>10.1e}")
        style = "--" if name == "nash_mp" else "-"  # lies on EGPO: they are one algorithm
        axes.semilogy(questions, curve, style, label=f"{label}, step {step:.2g}")
    axes.set_xlabel("questions to the judge")
    axes.set_ylabel("duality gap, median of 10 games")
    axes.set_title(f"Ten random games of ten answers, beta = {args.beta}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(args.out, dpi=150)
    print(f"drawn to {args.out}")


if __name__ == "__main__":
    main()
