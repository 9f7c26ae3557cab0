"""Group-in-group policy optimisation: credit for episodes of several turns."""

import torch
from torch import Tensor

from alignkit.errors import ConfigError, ShapeError
from alignkit.tensors import check_same_shape

EPSILON = 1e-6  # added to a standard deviation, so that a division by it stays finite


@torch.no_grad()
def gigpo_advantages(
    rewards: Tensor,
    mask: Tensor,
    turns: Tensor,
    states: Tensor,
    episodes: Tensor,
    groups: Tensor,
    *,
    gamma: float = 0.95,
    omega: float = 1.0,
    normalise: bool = False,
) -> Tensor:
    """Advantage of every own token: the episode's, plus `omega` times that of its turn.

    A row is one token sequence; an episode has one row, or several where its prompt was rewritten.
    `rewards` [N, T] stand at a turn's last own token. `mask` [N, T] bool is True at own tokens.
    `turns` [N, T] int64 number the turns of an episode in time. `states` [N, T] int64 are the key
    of the state in which the turn was taken. `episodes` and `groups` [N] int64 name the episode
    (unique over the batch) and the prompt of a row.

    The episode part compares an episode's sum of rewards with the mean over its group's episodes,
    the step part a turn's discounted return with the mean over all turns of the group that were
    taken in the same state. A set of one, or of equal values, contributes exactly 0; `normalise`
    divides each part by its own sample standard deviation + 1e-6. Computed in float64.

    Returns [N, T] in the dtype of `rewards`, 0 outside the mask. ShapeError for shapes that do not
    fit, ConfigError for gamma outside [0, 1] or omega that is negative or not finite. Source: Feng
    et al. 2025, arXiv:2505.10978, eqs. 3 to 8.
    """
    _check(rewards, mask, turns, states, episodes, groups, gamma, omega)
    result = torch.zeros_like(rewards)
    if not bool(mask.any()):
        return result

    # One entry per own token, then one per turn: turns of an episode are neighbours, in time.
    token_episode = episodes.unsqueeze(-1).expand_as(mask)[mask]
    token_turn = turns[mask]
    keys, turn_of_token = torch.stack([token_episode, token_turn], dim=1).unique(
        dim=0, return_inverse=True
    )
    n_turns = len(keys)
    turn_rewards = _sums(rewards[mask].double(), turn_of_token, n_turns)
    turn_states = states.new_empty(n_turns).scatter_(0, turn_of_token, states[mask])
    token_group = groups.unsqueeze(-1).expand_as(mask)[mask]
    turn_groups = groups.new_empty(n_turns).scatter_(0, turn_of_token, token_group)

    _, episode_of_turn = keys[:, 0].unique(return_inverse=True)
    n_episodes = int(episode_of_turn[-1]) + 1
    episode_rewards = _sums(turn_rewards, episode_of_turn, n_episodes)
    episode_groups = groups.new_empty(n_episodes).scatter_(0, episode_of_turn, turn_groups)

    returns = _discounted(turn_rewards, episode_of_turn, n_episodes, gamma)
    episode_part = _compared(episode_rewards, episode_groups.unsqueeze(-1), normalise)
    step_part = _compared(returns, torch.stack([turn_groups, turn_states], dim=1), normalise)
    advantages = episode_part[episode_of_turn] + omega * step_part
    result[mask] = advantages[turn_of_token].to(result.dtype)
    return result


def _check(
    rewards: Tensor,
    mask: Tensor,
    turns: Tensor,
    states: Tensor,
    episodes: Tensor,
    groups: Tensor,
    gamma: float,
    omega: float,
) -> None:
    check_same_shape(rewards=rewards, mask=mask, turns=turns, states=states)
    check_same_shape(episodes=episodes, groups=groups)
    if rewards.dim() != 2 or episodes.shape != rewards.shape[:1]:
        raise ShapeError(
            f"rewards has the shape {list(rewards.shape)} and episodes {list(episodes.shape)}; "
            "they should be [N, T] and [N]"
        )
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma is {gamma}; it should be between 0 and 1")
    if not 0 <= omega < float("inf"):
        raise ConfigError(f"omega is {omega}; it should be at least 0 and finite")


def _sums(values: Tensor, index: Tensor, n: int) -> Tensor:
    return values.new_zeros(n).index_add_(0, index, values)


def _discounted(rewards: Tensor, episodes: Tensor, n_episodes: int, gamma: float) -> Tensor:
    """Return of every turn [U] from the rewards of its episode's turns, which are neighbours."""
    lengths = torch.bincount(episodes, minlength=n_episodes)
    first = lengths.cumsum(0) - lengths
    place = torch.arange(len(rewards), device=rewards.device) - first[episodes]

    longest = int(lengths.max())
    table = rewards.new_zeros(n_episodes, longest)
    table[episodes, place] = rewards

    # powers[k, t] = gamma ** (k - t) for k >= t, else 0
    steps = torch.arange(longest, device=rewards.device, dtype=rewards.dtype)
    lag = steps.unsqueeze(-1) - steps
    powers = torch.where(lag >= 0, gamma ** lag.clamp(min=0), 0.0)
    return (table @ powers)[episodes, place]


def _compared(values: Tensor, keys: Tensor, normalise: bool) -> Tensor:
    """Value minus the mean of its set [n]; exactly 0 in a set of one or of equal values."""
    sets, index = keys.unique(dim=0, return_inverse=True)
    n = len(sets)
    count = torch.bincount(index, minlength=n)
    mean = _sums(values, index, n) / count
    centred = values - mean[index]

    highest = values.new_empty(n).scatter_reduce_(0, index, values, "amax", include_self=False)
    lowest = values.new_empty(n).scatter_reduce_(0, index, values, "amin", include_self=False)
    equal = (highest == lowest)[index]
    if normalise:
        variance = _sums(centred.square(), index, n) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPSILON)[index]
    return torch.where(equal, 0.0, centred)
