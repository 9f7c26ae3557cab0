"""How the threads of a tensor product wait for each other."""

import os

# Between two products libgomp's threads turn in a loop for 300,000 rounds before they sleep. On a
# core that somebody else uses, the thread they wait for cannot run meanwhile. This is the count
# that libgomp itself takes once it has started more threads than there are cores.
SPINS = "1000"

# Settings by which a user may have chosen a way of waiting.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_")


def wait_briefly() -> None:
    """Let waiting threads give their core away early, unless the environment says how they wait.

    OpenMP reads the setting when torch is loaded, so this comes before that; processes that are
    started inherit it.
    """
    if not any(name.startswith(_CHOSEN) for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPINS
