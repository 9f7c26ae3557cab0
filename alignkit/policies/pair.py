"""The policy pair: the trained policy with its anchors, the one object that gives log-probs.

The training loop, sampling and evaluation go through `PolicyPair` and never touch the models
themselves. It scores completions, stores the reference's log-probs, lends a model for generation,
and knows what a checkpoint has to hold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit.batches import Bundle, Outputs, Plan, TokenLogps, whole_lengths
from alignkit.config.train import TrainConfig
from alignkit.errors import CheckpointError, ModelError
from alignkit.policies.dtensors import like
from alignkit.policies.export import save_heads, save_model, with_fields
from alignkit.policies.flat_logps import FlatLogps
from alignkit.policies.head import AnchorLaws, AnchorStates
from alignkit.policies.layout import Layout, Rows, build_rows, micro_batches
from alignkit.policies.lazy import changed
from alignkit.policies.module import PolicyModule, causal_lm
from alignkit.policies.reference import Anchor
from alignkit.policies.rewinding import rewound
from alignkit.policies.seen_states import SeenStates
from alignkit.policies.sharded_export import save_sharded
from alignkit.policies.sharding import Shards, check_launch, check_sharded, make_shards
from alignkit.policies.slices import StoredTensors
from alignkit.policies.stored_laws import IDS, StoredLaws
from alignkit.policies.tensor_parallel import Own
from alignkit.tensors import check_same_shape, stacked

SCORING_BUDGET = 8192  # tokens per forward without gradient
RESCORED = 4  # bundles whose stored log-probs are compared with live ones
ANCHOR_PREFIX = "anchor."


class PolicyPair:
    """A trained module and what anchors it. Built by `alignkit.policies.load.load_pair`."""

    def __init__(
        self,
        base: PolicyModule,
        tokenizer: Any,
        anchors: Mapping[str, Anchor],
        *,
        layout: Layout = "shared_prefix",
        notes: Sequence[str] = (),
        save_config: Mapping[str, object] | None = None,
        save_dtype: torch.dtype | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.base = base  # the PolicyModule itself
        self.module: nn.Module = base  # the same, or accelerate's wrapper around it
        self.tokenizer = tokenizer
        self.anchors = dict(anchors)
        self.layout: Layout = layout
        self.notes = list(notes)
        self._save_config = dict(save_config or {})  # config fields that loading had changed
        self.save_dtype = save_dtype  # of the saved weights; None: as they were trained
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.shards = shards  # None: every process holds the weights whole
        self._seen = SeenStates()

    @property
    def device(self) -> torch.device:
        """Where the policy lives."""
        return next(self.base.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Rows of the head: V."""
        return int(causal_lm(self.base.model).config.get_text_config().vocab_size)

    @property
    def reference_kind(self) -> str:
        """The resolved kind of the reference; "none" without one."""
        return self.anchors["reference"].kind if "reference" in self.anchors else "none"

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in self.base.parameters() if p.requires_grad]

    def prepare(
        self,
        accelerator: Any,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        train: TrainConfig | None = None,
    ) -> torch.optim.Optimizer:
        """Spread the policy over the processes, move the anchors to its device, and return the
        optimiser of its parameters.

        With `train.shard` that is torch's own `fully_shard`; otherwise accelerate wraps the policy
        in what it was launched for. ConfigError where that was shards and none were made.
        """
        self._autocast = accelerator.autocast
        for anchor in self._networks[1:]:
            anchor.to(accelerator.device)
        check_launch(accelerator)

        processes = accelerator.num_processes
        if train is not None and train.shard and processes > 1:
            if self.shards is None:  # the models were loaded whole
                self.shards = make_shards(accelerator.device.type, processes, train)
                for network in self._networks:
                    self.shards.place(network, lambda: None)
            optimizer = make_optimizer(self.parameters())
            return cast(torch.optim.Optimizer, accelerator.prepare(optimizer))

        self.module, optimizer = accelerator.prepare(self.base, make_optimizer(self.parameters()))
        check_sharded(self.base)
        return optimizer

    @property
    def _networks(self) -> list[PolicyModule]:
        """The policy, and the anchors that are models of their own."""
        return [self.base, *(a.module for a in self.anchors.values() if a.module is not None)]

    def together(self) -> AbstractContextManager[None]:
        """Inside the block each process may call sharded models as often as it likes, without
        gradients; every process has to enter. See `Shards.together`.
        """
        return nullcontext() if self.shards is None else self.shards.together()

    def forward(self, bundles: Sequence[Bundle], plan: Plan) -> TokenLogps | Outputs:
        """What the objective of `plan` is given for these completions: a policy's `logps`."""
        return self.logps(bundles, plan)

    def logps(
        self, bundles: Sequence[Bundle], plan: Plan, *, anchors: bool = True, again: bool = False
    ) -> TokenLogps:
        """Per-token log-probs of the N completions of `bundles`, with gradient iff it is enabled.

        With `anchors` also the plan's anchors (stored ones where every bundle has them, else live)
        and statistics; without, the policy alone. `again` says that the same micro-batch comes once
        more before the next step. Extras: "entropy" (detached), "values",
        "log_partition", the statistics, and with a gradient "aux_loss" of a mixture of experts.
        """
        bundles, own = self._joined(bundles)
        rows = self._rows(bundles)
        known = self._known(bundles, plan, rows, anchors=anchors)
        laws = self._laws(bundles, plan, rows, again) if anchors else None

        self.module.train(torch.is_grad_enabled())
        with self._autocast():
            statistics = plan.statistics if anchors else {}
            results = self.module(rows, statistics, laws, partition=plan.partition)
        extras = {name: rows.scatter(values) for name, values in results.items()}

        by_name = dict(known.anchors)
        if laws is not None:
            by_name[plan.anchors[0]] = extras.pop("anchor")
        return own(replace(known, policy=extras.pop("policy"), anchors=by_name, extras=extras))

    def known_logps(self, bundles: Sequence[Bundle], plan: Plan) -> TokenLogps:
        """What is known of the N completions without asking the policy: the sampler's log-probs
        and those of the plan's anchors, without one that statistics read. The policy's own are NaN,
        so that nobody takes them for an answer.
        """
        bundles, own = self._joined(bundles)
        return own(self._known(bundles, plan, self._rows(bundles), anchors=True))

    def _joined(self, bundles: Sequence[Bundle]) -> tuple[Sequence[Bundle], Own]:
        """What is computed in one forward with these bundles, and what takes their part of it."""
        group = None if self.shards is None else self.shards.group
        return (bundles, lambda tokens: tokens) if group is None else group.joined(bundles)

    def _known(
        self, bundles: Sequence[Bundle], plan: Plan, rows: Rows, *, anchors: bool
    ) -> TokenLogps:
        """The same for completions laid out as `rows`. An anchor's log-probs are the stored ones
        where every bundle has them, else live.
        """
        by_name = {}
        for name in plan.anchors if anchors else ():
            anchor = self.anchors.get(name)
            if anchor is not None and anchor.module is not None:
                anchor.check_labels(name, rows.labels, self.vocab_size)
            if plan.statistics and name == plan.read_by_statistics:
                continue
            if all(name in bundle.tokens for bundle in bundles):
                by_name[name] = self._stored(bundles, name, rows)
            else:
                by_name[name] = rows.scatter(self._score(name, rows))

        sampled = all("behavior" in bundle.tokens for bundle in bundles)
        behavior = self._stored(bundles, "behavior", rows) if sampled else None
        unknown = torch.full(rows.shape, torch.nan, device=self.device).where(rows.mask, 0.0)
        whole = whole_lengths(bundles, rows.labels.device)
        return TokenLogps(unknown, by_name, rows.mask, behavior, {}, whole)

    def _laws(
        self, bundles: Sequence[Bundle], plan: Plan, rows: Rows, again: bool
    ) -> AnchorLaws | None:
        """The next-token distributions of the anchor that statistics read, if they read one. It
        only lends its hidden states: the policy's head computes its log-probs chunk by chunk beside
        the policy's own.
        """
        name = plan.read_by_statistics if plan.statistics else None
        if name is None:
            return None
        anchor = self.anchors.get(name)
        if all(IDS in bundle.tokens for bundle in bundles):
            return StoredLaws.of(bundles, rows, None if anchor is None else anchor.vocabulary)
        lasts = anchor is not None and anchor.lasts and self.shards is None
        return self._seen.of(name, rows, self.states, again and lasts)

    @property
    def packing(self) -> float | None:
        """The `packing` of `build_rows`: the policy's, if every anchor can take packed rows too."""
        return self.base.packing if all(each.packing for each in self._networks) else None

    def _rows(self, bundles: Sequence[Bundle]) -> Rows:
        return build_rows(bundles, self.layout, self.device, packing=self.packing)

    def micro_batches(self, bundles: Sequence[Bundle], budget: int) -> list[list[int]]:
        """Indices of the bundles of each forward of at most `budget`
        tokens; see `alignkit.policies.layout.micro_batches`.
        """
        return micro_batches(bundles, budget, self.layout, packing=self.packing)

    def _stored(self, bundles: Sequence[Bundle], name: str, rows: Rows) -> Tensor:
        """Log-probs that the bundles carry under `name`, [N, T], 0 outside the mask."""
        values = [row.float() for bundle in bundles for row in bundle.tokens[name]]
        flat = stacked(values, rows.shape[1])
        check_same_shape(stored=flat, mask=rows.mask)
        return torch.where(rows.mask, flat.to(rows.labels.device), 0.0)

    @torch.no_grad()
    def _score(self, name: str, rows: Rows) -> Tensor:
        """An anchor's log-probs of the labels [M]."""
        with self._active(name) as module, self._autocast():
            logps: Tensor = module.eval()(rows, entropy=False)["policy"]
            return logps.float()

    @torch.no_grad()
    def states(self, name: str, rows: Rows) -> AnchorStates:
        """An anchor's hidden states and head, for statistics over its vocabulary."""
        with self._active(name) as module, self._autocast():
            results = module.eval()(rows, hidden_only=True)
        anchor = self.anchors[name]
        if anchor.module is not None:
            return AnchorStates(results["hidden"], results["head"])

        # This anchor lives inside the policy: its head is the policy's, with the anchor's adapter.
        head = replace(self.base.head, context=lambda: anchor.active(self.base, self.base))
        return AnchorStates(results["hidden"], head)

    def _active(self, name: str) -> AbstractContextManager[nn.Module]:
        """The module of an anchor, inside the block. ModelError where the run has no such anchor."""
        if name not in self.anchors:
            known = ", ".join(["policy", *self.anchors])
            raise ModelError(
                f"this run has no anchor {name!r}, only {known}; set the recipe's `{name}` section"
            )
        return self.anchors[name].active(self.module, self.base)

    def cached(self, bundles: Sequence[Bundle], plan: Plan) -> Sequence[Bundle]:
        """The bundles with the reference's log-probs stored in `tokens["reference"]`; call it
        before the policy moves.

        A few bundles are scored a second time by themselves; the largest difference goes to
        `notes`.
        """
        reference = FlatLogps(bundles)

        def with_reference(place: int, bundle: Bundle) -> Bundle:
            return replace(bundle, tokens={**bundle.tokens, "reference": reference[place]})

        with self.together():
            for group in self.micro_batches(bundles, SCORING_BUDGET):
                scored = self._reference_tokens([bundles[i] for i in group])
                for place, logps in zip(group, scored):
                    reference[place] = logps

            filled = changed(bundles, with_reference)
            worst = self.rescored(filled)
        self.notes.append(
            f"reference log-probs stored for {len(filled)} bundles; scored again one by one they "
            f"differ by at most {worst:.1e}"
        )
        return filled

    def rescored(self, bundles: Sequence[Bundle]) -> float:
        """The largest difference between stored and live log-probs of a few bundles, infinite where
        one of them is not finite; call it before the policy moves.
        """
        step = -(-len(bundles) // RESCORED) or 1
        with self.together():
            scored = [(self._reference_tokens([bundle])[0], bundle) for bundle in bundles[::step]]
        differences = [
            (one - other).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()
            for logps, bundle in scored
            for one, other in zip(logps, bundle.tokens["reference"])
            if len(one)
        ]
        return float(max(differences, default=0.0))

    def _reference_tokens(self, bundles: Sequence[Bundle]) -> list[list[Tensor]]:
        """The reference's log-probs of each completion of each bundle, K x [T_k]."""
        rows = self._rows(bundles)
        scored = iter(rows.scatter(self._score("reference", rows)).cpu())
        return [[next(scored)[: len(ids)] for ids in bundle.completions] for bundle in bundles]

    def rewound(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Take steps inside the block that are undone at its end, bit for bit."""
        return rewound(self.parameters(), optimizer)

    @contextmanager
    def model(self, name: str = "policy") -> Iterator[nn.Module]:
        """A transformers causal LM for generation, in evaluation mode: "policy" or an anchor. Only
        valid inside the block, which all processes enter where the models are sharded.
        """
        anchor = self.anchors.get(name)
        if anchor is not None and anchor.kind == "cached" and anchor.moved:
            raise ModelError(
                "reference.kind: a cached reference cannot generate; set reference.kind=frozen"
            )
        active = nullcontext(self.base) if name == "policy" else self._active(name)
        with self.together(), active as module, self._autocast():
            base: Any = self.base if module is self.module else module
            base.eval()
            yield base.model

    def after_step(self, step: int) -> None:
        """Tell the anchors that optimiser step `step` (counted from 1) is done."""
        self._seen.clear()
        for anchor in self.anchors.values():
            anchor.after_step(step, self.base)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint covers: trainable parameters and moving anchors, live, or their shards."""
        tensors: dict[str, Tensor] = {
            name: p for name, p in self.base.named_parameters() if p.requires_grad
        }
        for name, anchor in self.anchors.items():
            for key, value in anchor.state(self.base).items():
                tensors[f"{ANCHOR_PREFIX}{name}.{key}"] = value
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of `tensors`, as `load_state` takes them: shards where they are, others on the CPU."""
        return {
            name: tensor.clone() if isinstance(tensor, DTensor) else tensor.cpu().clone()
            for name, tensor in self.tensors().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, or what a checkpoint holds of it, of which a shard is read
        alone; names and shapes must be the same.
        """
        own = self.tensors()
        stored = state.by_name if isinstance(state, StoredTensors) else state
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != shapes[k]]
        if wrong:
            raise CheckpointError(
                f"the checkpoint does not fit this model and reference: {len(wrong)} tensors "
                f"differ, e.g. {wrong[0]}"
            )

        for name, tensor in own.items():
            if isinstance(state, StoredTensors):
                state.stored(name).read_into(tensor)
            else:
                tensor.copy_(like(state[name], tensor))
        for anchor in self.anchors.values():
            anchor.moved = True

    def save(self, folder: Path | str, *, writes: bool = True) -> None:
        """Write the policy so that `from_pretrained` loads it (a LoRA run: the adapter, in peft's
        layout), and the tokenizer.

        A sharded policy is written by all processes, which take turns; the one with `writes` adds
        what is no weight.
        """
        model = self.base.model

        # Loading switched dropout off; the saved config has the rates it came with.
        with with_fields(causal_lm(model).config, self._save_config):
            if self.shards is None:
                save_model(model, folder, self.save_dtype)
            else:
                save_sharded(model, Path(folder), self.save_dtype, writes=writes)
        save_heads(self.base, folder, writes=writes)
        if self.tokenizer is not None and writes:
            self.tokenizer.save_pretrained(folder)
