"""Which self-play algorithm reaches the equilibrium of a cyclic preference game? Exact runs, no
sampling, a few seconds on a CPU.

    python examples/nash_tabular.py --out nash_tabular.png

Ten random games of ten answers; KL to a random reference with weight beta. All algorithms ask the
judge the same number of questions (how often does each answer beat the present opponent?). EGPO and
Nash-MP take the step size that theory gives, the others the one that ends best. What to see: mirror
descent, Nash-MD and the gradient methods circle and come down slowly; the gap of the extragradient
methods falls along a straight line on the logarithmic axis, by a constant factor per question. SPPO
and ONPO play the game without the KL, online DPO and XPO are made for judges without cycles: they
end elsewhere.
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from alignkit.oracles.games import random_games
from alignkit.oracles.self_play import ALGORITHMS, tuned

LABELS = {
    "omd": "mirror descent",
    "nash_md": "Nash-MD",
    "online_ipo": "online IPO",
    "ipo_md": "IPO-MD (0.125)",
    "inpo": "INPO",
    "nash_ema": "Nash-EMA (0.9)",
    "rspo": "RSPO, reverse KL",
    "sppo": "SPPO",
    "onpo": "ONPO",
    "online_dpo": "online DPO",
    "xpo": "XPO",
    "egpo": "EGPO",
    "nash_mp": "Nash-MP",
}
# Other parametrisations of mirror descent, online IPO and EGPO: their curves lie on those, so they
# are dashed.
ALIKE = ("inpo", "rspo", "nash_mp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="nash_tabular.png", help="the picture")
    parser.add_argument(
        "--beta", type=float, default=0.01, help="weight of the KL to the reference"
    )
    parser.add_argument("--questions", type=int, default=1000, help="judge questions per run")
    args = parser.parse_args()

    # Thirteen curves need more colours than matplotlib's ten.
    game = random_games(10, 10, args.beta)
    plt.rc("axes", prop_cycle=plt.cycler(color=plt.get_cmap("tab20").colors))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    print(f"{'algorithm':<16} {'step':>8} {'questions':>10} {'gap':>10}")
    for name, label in LABELS.items():
        curve, step = tuned(game, name, args.questions)
        questions = torch.arange(len(curve)) * ALGORITHMS[name].queries
        print(f"{label:<16} {step:>8.3g} {int(questions[-1]):>10} {float(curve[-1]):>10.1e}")
        line = "--" if name in ALIKE else "-"
        axes.semilogy(questions, curve, line, label=f"{label}, step {step:.2g}")

    axes.set_xlabel("questions to the judge")
    axes.set_ylabel("duality gap, median of 10 games")
    axes.set_title(f"Ten random games of ten answers, beta = {args.beta}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out, dpi=150)
    print(f"drawn to {args.out}")


if __name__ == "__main__":
    main()
