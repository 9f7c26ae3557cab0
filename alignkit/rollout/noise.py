"""Counter-based Gumbel noise: a pure function of (seed, step,
prompt, completion, position, vocabulary index).

Nothing is drawn from a stateful generator, so the noise of one token does not depend on which rows
share its batch, on how many processes sample, or on what was sampled before; resume needs no random
state, and two objectives compared under one seed see the same noise. Integer arithmetic wraps alike
on every device.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Multipliers of the 32-bit finaliser "lowbias32" (Wellons 2018), as int32.
_FIRST_MULTIPLIER = 0x7FEB352D
_SECOND_MULTIPLIER = 0x846CA68B - (1 << 32)


def row_keys(
    seed: int, step: int, prompts: Tensor, completions: Tensor, positions: Tensor
) -> Tensor:
    """One 64-bit key per row. prompts, completions, positions: int64 [B] -> int64 [B].

    The coordinates are absorbed one after the other by the splitmix64 finaliser (Steele et al.
    2014).
    """
    key = _mix64(torch.full_like(prompts, _signed(seed, 64)))
    for part in (torch.full_like(prompts, _signed(step, 64)), prompts, completions, positions):
        key = _mix64(key ^ part)
    return key


def uniform(keys: Tensor, size: int) -> Tensor:
    """Uniform numbers in (0, 1), float32: int64 keys [B] -> [B, size]. Spaced by 2^-31 near 0, so
    that rare tokens stay exact.
    """
    low = (keys & 0xFFFFFFFF).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]

    # The finaliser of (hashed index ^ low half of the key); the high half enters in its middle, so
    # that keys with the same low half still differ.
    words = _xorshift(_indices(size, keys.device) ^ low, 16).mul_(_FIRST_MULTIPLIER).add_(high)
    words = _xorshift(_xorshift(words, 15).mul_(_SECOND_MULTIPLIER), 16)

    # 31 bits to the middles of 2^31 intervals; rounded to float32 the last of them would be 1.
    bits = words.bitwise_and_(0x7FFFFFFF)
    return bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise, float32: int64 keys [B] -> [B, size]. argmax(log-probs + noise)
    samples the log-probs.
    """
    # -log(-log(1 - u)): the large values, which decide the argmax, come from small u, where float32
    # is dense.
    return uniform(keys, size).neg_().log1p_().neg_().log_().neg_()


def _signed(number: int, bits: int) -> int:
    """`number` modulo 2^bits as a two's-complement integer."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def _mix64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser of x + the golden gamma, on int64."""
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=4)
def _indices(size: int, device: torch.device) -> Tensor:
    """Hashed vocabulary indices, int32 [size]: the same for every row."""
    words = _xorshift(torch.arange(size, dtype=torch.int32, device=device), 16)
    words = _xorshift(words.mul_(_FIRST_MULTIPLIER), 15)
    return _xorshift(words.mul_(_SECOND_MULTIPLIER), 16)


def _xorshift(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >>> bits): int32 shifts carry the sign in, so it is masked off."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1).bitwise_xor_(x)
