"""Anchors: the policies that the trained one is compared with, first of all the KL's reference.

An anchor is a frozen copy, the policy without its adapter, the policy with the adapter it started
from, stored log-probs, a moving average of the policy, or a copy that is renewed every few steps or
when the objective asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignkit.batches import Plan
from alignkit.config.model import TargetConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.dtensors import local
from alignkit.policies.module import PolicyModule
from alignkit.policies.sharding import Shards, frozen_copy

KINDS = ("auto", "frozen", "adapter_off", "cached", "ema", "synced")
ASKED = "asked"  # kind of an anchor that becomes the policy when the objective says so
MOVING = ("ema", "synced", "lagged", ASKED)
START_ADAPTER = "reference"  # the frozen twin of a pretrained adapter that is trained on


def resolve_kind(kind: str, plan: Plan, *, adapter: bool, fixed_data: bool) -> str:
    """The kind of reference that `reference.kind` means for this run: one of KINDS but "auto", a
    path, or "none" where the objective needs no reference.

    Raises ConfigError for a kind that this run cannot have.
    """
    sampled = any("reference" in draw.models for draw in plan.samples)
    if "reference" not in plan.anchors and not sampled:
        return "none"
    if kind == "adapter_off" and not adapter:
        raise ConfigError(
            "reference.kind: adapter_off needs a LoRA adapter without which the model is what it was "
            "at the start; set model.adapter, or reference.kind=frozen"
        )

    # Log-probs can be stored once if every completion is known before training starts.
    reasons = {
        "completions are sampled during the run": not fixed_data or sampled,
        "its loss reads the reference's whole vocabulary": plan.read_by_statistics == "reference",
        "it scores prompts with other prompts' completions, new ones every step": plan.mismatched,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    if kind == "cached" and why:
        raise ConfigError(
            f"reference.kind: cached does not work for this objective ({why}); use auto, frozen or "
            "adapter_off"
        )

    if kind != "auto":
        return kind
    if not why:
        return "cached"
    return "adapter_off" if adapter else "frozen"


@dataclass
class Anchor:
    """One anchor policy. `module` is its own copy; None for the kinds that live inside the policy,
    and for kind stored, a teacher that the bundles speak for.
    """

    kind: str
    module: PolicyModule | None = None
    decay: float = 0.99  # kind ema: the share of itself that a step leaves
    every: int = 64  # kind synced: steps between two copies of the policy
    moved: bool = False  # kind cached: the policy is no longer what it was at the start
    # Kind lagged: the synced anchor whose previous copy this one holds.
    follows: "Anchor | None" = None
    vocabulary: int | None = None  # kind stored: how many tokens the policy and it share

    @classmethod
    def of(
        cls, kind: str, policy: PolicyModule, config: TargetConfig, shards: Shards | None = None
    ) -> "Anchor":
        """The anchor of a kind, started at the policy's present weights."""
        if kind in ("cached", "adapter_off"):
            return cls(kind)
        return cls(kind, frozen_copy(policy, shards), config.decay, config.every)

    @classmethod
    def before(
        cls, target: "Anchor", policy: PolicyModule, shards: Shards | None = None
    ) -> "Anchor":
        """What `target` was before its last copy of the policy."""
        if target.kind != "synced":
            raise ConfigError(
                "target.kind: this objective compares two past policies, which only `synced` has; "
                f"got {target.kind}"
            )
        return cls("lagged", frozen_copy(policy, shards), every=target.every, follows=target)

    @contextmanager
    def active(self, policy: nn.Module, base: PolicyModule) -> Iterator[nn.Module]:
        """The module to call for this anchor. `policy` is the prepared module around `base`, as it
        may be wrapped for DDP.
        """
        if self.module is not None:
            yield self.module
        elif self.kind == "stored":
            raise ModelError(
                "teacher.top: the teacher was asked for what it has not stored; leave `top` and "
                "`store` out, so that it stays loaded"
            )
        elif self.kind == "cached":
            if self.moved:
                raise ModelError(
                    "reference.kind: a cached reference was asked for log-probs it has not stored, "
                    "and the policy has moved since; score all bundles before training, or set "
                    "reference.kind=frozen"
                )
            yield policy

        # The policy's weights stay where they are; only its adapter is changed or switched off.
        elif START_ADAPTER in base.model.peft_config:
            trained = base.model.active_adapter
            base.model.set_adapter(START_ADAPTER, inference_mode=True)
            try:
                yield policy
            finally:
                base.model.set_adapter(trained)
        else:
            with base.adapter_disabled():
                yield policy

    @property
    def lasts(self) -> bool:
        """Whether its own weights stay what they are for the whole run."""
        return self.module is not None and self.kind not in MOVING

    def check_labels(self, name: str, labels: Tensor, vocabulary: int) -> None:
        """ModelError where one of the labels [M], tokens of a policy of so many, is one that this
        anchor does not have, because its vocabulary was cut.
        """
        own = None if self.module is None else self.module.vocabulary
        if own is None or own >= vocabulary or not len(labels) or int(labels.max()) < own:
            return
        raise ModelError(
            f"a completion has the token {int(labels.max())}, which the {name} does not have: its "
            f"vocabulary ends at {own - 1}. It is padding of the policy's embedding; lower "
            "train.learning_rate, or take a model without padding"
        )

    @torch.no_grad()
    def after_step(self, step: int, base: PolicyModule) -> None:
        """Move towards the policy after optimiser step `step` (counted from 1)."""
        self.moved = True
        if self.module is None or self.kind not in MOVING or self.kind == ASKED:
            return
        if self.kind == "ema" or step % self.every == 0:
            self.renew(base)

    @torch.no_grad()
    def renew(self, base: PolicyModule) -> None:
        """Become the policy, or with kind ema move towards it."""
        # A lagged anchor takes over what the synced one holds, which is renewed after it.
        followed: dict[str, Tensor] = {}
        if self.follows is not None:
            followed = {name: value for name, value, _ in self.follows._trained(base)}
        for name, own, trained in self._trained(base):
            # Anchors are sharded as the policy is, so each process moves its own part.
            new = local(followed[name] if followed else trained)
            if self.kind == "ema":
                local(own).lerp_(new.to(own.dtype), 1 - self.decay)
            else:
                local(own).copy_(new)

    def _trained(self, base: PolicyModule) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, own tensor and the policy's tensor of each weight that the policy trains."""
        assert self.module is not None
        for (name, own), new in zip(
            self.module.model.named_parameters(), base.model.parameters(), strict=True
        ):
            if new.requires_grad:
                yield name, own, new

    def state(self, base: PolicyModule) -> dict[str, Tensor]:
        """What a checkpoint has to keep: the weights of a moving anchor."""
        if self.kind not in MOVING:
            return {}
        return {name: own for name, own, _ in self._trained(base)}


def following_anchors(
    target: TargetConfig, plan: Plan, base: PolicyModule, shards: Shards | None = None
) -> dict[str, Anchor]:
    """The anchors that the plan asks for and that follow the policy during the run."""
    anchors = {}
    if "previous" in plan.anchors:
        # It comes first: after a step it takes over from the target before the target moves.
        synced = Anchor.of(target.kind, base, target, shards)
        anchors = {"previous": Anchor.before(synced, base, shards), "target": synced}
    elif "target" in plan.anchors:
        anchors = {"target": Anchor.of(target.kind, base, target, shards)}

    if any("proposal" in draw.models for draw in plan.samples):
        anchors["proposal"] = Anchor(ASKED, frozen_copy(base, shards))
    return anchors
