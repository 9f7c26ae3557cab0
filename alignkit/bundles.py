"""What the models are given and what they give back: bundles of tokens in, log-probs out.

Axes: K completions of one prompt, N completions of a whole batch, T tokens. Log-probs are natural
logarithms, in nats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from alignkit.tensors import masked_sum


@dataclass(frozen=True)
class Bundle:
    """One prompt with K completions. All tensors live on the CPU until the layout moves them.

    A demonstration has K = 1, a pair K = 2 (chosen, rejected), a rollout one completion per sample.
    """

    prompt: Tensor  # [P] int64, at least one token
    completions: Sequence[Tensor]  # K x [T_k] int64
    masks: Sequence[Tensor]  # K x [T_k] bool: which tokens are trained; may have holes (dialogues)
    uid: str = ""  # where the row comes from ("preferences.jsonl:17"); named in errors
    # Name -> [K], one number per completion: "label", "score", "preference", ...; "table" is [K, K].
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    # Name -> K x [T_k], one number per token: "behavior", an anchor's stored log-probs,
    # "advantages", "returns", ...
    tokens: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    # This prompt with another prompt's completion (KTO's z0); never trained on.
    mismatched: bool = False

    @property
    def n_trained(self) -> int:
        """Trained tokens over all completions."""
        return sum(int(mask.sum()) for mask in self.masks)

    @property
    def n_tokens(self) -> int:
        """Tokens the shared-prefix layout computes for this bundle."""
        return len(self.prompt) + sum(len(ids) for ids in self.completions)


@dataclass(frozen=True)
class TokenLogps:
    """Per-token log-probs of N completions, padded to T. Everything is 0 where `mask` is False."""

    # [N, T] log pi(y_t | prompt, y_<t), with gradient in training.
    policy: Tensor
    # Name -> [N, T], never with gradient; "reference" anchors the KL.
    anchors: Mapping[str, Tensor]
    # [N, T] bool, True at trained tokens.
    mask: Tensor
    # [N, T] log-probs under the policy that sampled the tokens.
    behavior: Tensor | None = None
    # Name -> [N, T]: "entropy", "values" and the plan's statistics.
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    # [N] tokens that the mean over a completion is divided by: those of its whole episode, where
    # that was cut into several rows. None: its own, `lengths`.
    whole_lengths: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """The reference's log-probs [N, T]."""
        return self.anchors["reference"]

    @property
    def log_ratio(self) -> Tensor:
        """log policy - log reference per token [N, T]."""
        return self.policy - self.reference

    @property
    def lengths(self) -> Tensor:
        """Trained tokens per completion [N]."""
        return self.mask.sum(-1)

    @property
    def cut(self) -> bool:
        """Whether a row is one of several of an episode."""
        return self.whole_lengths is not None and bool((self.whole_lengths != self.lengths).any())

    def sequence(self, name: str = "policy") -> Tensor:
        """Sum over the trained tokens of `policy`, `behavior`, an anchor or an extra: [N]."""
        return masked_sum(self.get(name), self.mask)

    def get(self, name: str) -> Tensor:
        """`policy`, `behavior`, an anchor or an extra by name: [N, T]."""
        if name == "policy":
            return self.policy
        if name == "behavior":
            assert self.behavior is not None, "this batch has no behaviour log-probs"
            return self.behavior
        return self.anchors[name] if name in self.anchors else self.extras[name]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """`fn` applied to every tensor [N, T]; `whole_lengths` are left out."""
        return replace(
            self,
            policy=fn(self.policy),
            anchors={name: fn(values) for name, values in self.anchors.items()},
            mask=fn(self.mask),
            behavior=None if self.behavior is None else fn(self.behavior),
            extras={name: fn(values) for name, values in self.extras.items()},
            whole_lengths=None,
        )

    def select(self, index: Tensor) -> Self:
        """The completions at `index` [n]."""
        return self.map(lambda t: t[index])


@dataclass(frozen=True)
class Outputs:
    """What a reward or preference model gives for N whole completions: D numbers for each."""

    values: Tensor  # [N, D], with gradient when trained; D is `plan.outputs`


def whole_lengths(bundles: Sequence[Bundle], device: torch.device) -> Tensor | None:
    """`TokenLogps.whole_lengths` of the completions of these bundles; None where they have none."""
    if not all("episode_tokens" in bundle.rows for bundle in bundles):
        return None
    return torch.cat([bundle.rows["episode_tokens"] for bundle in bundles]).to(device)
