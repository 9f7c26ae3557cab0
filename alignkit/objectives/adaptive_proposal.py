"""A proposal that becomes the policy where that is the nearer of the two to a target: the adaptive
sampler of distributional policy gradients (Khalifa et al. 2021, arXiv:2012.11635, algorithm 2).
"""

import torch
from torch import Tensor

State = dict[str, Tensor]


def proposal_gains(
    target_logps: Tensor, proposal_logps: Tensor, policy_logps: Tensor, groups: Tensor
) -> Tensor:
    """KL(target || proposal) - KL(target || policy) of each prompt: [N] x 4 -> [G], nats.

    Log-probs are sums over whole completions that the proposal drew; the target's need no
    normaliser, since the two KLs share it. Completions weigh by target / proposal, normalised within
    their group: exact where a group holds every completion as often as the proposal draws it. Few
    completions per group pull the estimate towards that of the proposal's own law, where the policy
    never looks nearer.
    """
    _, index = groups.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    log_weights = target_logps - proposal_logps
    largest = log_weights.new_full((count,), -torch.inf)
    largest = largest.scatter_reduce(0, index, log_weights, "amax")

    weights = (log_weights - largest[index]).exp()
    total = log_weights.new_zeros(count).index_add(0, index, weights)
    gain = weights * (policy_logps - proposal_logps)
    return log_weights.new_zeros(count).index_add(0, index, gain) / total


def empty_window() -> State:
    """The state of an adaptive proposal before its first samples."""
    names = ("proposal_gain", "proposal_samples", "proposal_renewals")
    return {name: torch.zeros((), dtype=torch.float64) for name in names}


def looked_at(state: State, gains: Tensor, samples: int, window: int) -> tuple[State, bool]:
    """The next state after `samples` more completions with these mean gains [G], and whether the
    proposal is to become the policy: once in every `window` completions, where their mean gain is
    above 0.
    """
    seen = state["proposal_samples"]
    if seen >= window:  # the last look was the end of its window
        seen = torch.zeros_like(seen)
    together = seen + samples
    before = state["proposal_gain"] * (seen / together)
    gain = before + gains.mean() * (samples / together)

    renew = bool(together >= window and gain > 0)
    renewals = state["proposal_renewals"] + renew
    names = ("proposal_gain", "proposal_samples", "proposal_renewals")
    return dict(zip(names, (gain, together, renewals))), renew
