"""Merging of finished models that started from the same weights, into one model on disk.

Everything is done on task vectors, model - start (alignkit.policies.merging). A LoRA run takes part
with the weights that it has with its adapter folded in: adding up the factors A and B of several
adapters would multiply one run's A by another's B.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from alignkit import files
from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.merging import linear, slerp
from alignkit.policies.tokenizer import same_vocabulary
from alignkit.runs.fitted_merge import WeightFit, fit_weights, model_laws, read_prompts
from alignkit.runs.inputs import content_hash
from alignkit.runs.trained_model import find_finished, load_finished
from alignkit.tasks import DEFAULT_TASK

MERGE_FILE = "merge.json"

Method = Literal["linear", "slerp"]
Tensors = dict[str, Tensor]  # name -> tensor; tied tensors stand there once


@dataclass(frozen=True)
class MergeRequest:
    """`start + share * merged task vector`, for each share.

    None: equal weights, the start that the runs name.
    """

    models: Sequence[str]  # run folders, models or adapters
    to: Path
    method: Method = "linear"
    weights: Sequence[float] | None = None  # one per model
    toward: str | None = None  # the start; a share below 1 goes towards it
    shares: Sequence[float] = (1.0,)  # several: one folder in `to` for each
    # Pattern of tensor names, as in a shell -> the weights of those tensors; the first that matches
    # counts, and the others have `weights`. Klagges et al. 2025, arXiv:2506.14794.
    tensors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    # Files of prompts, one for all or one per model, by which the weights are found: DivMerge,
    # Touayouch et al. 2025, arXiv:2509.02108.
    fit: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.fit and (self.weights or self.tensors or self.method != "linear"):
            raise ConfigError(
                "merge: --fit finds the weights of the linear method; leave --weights, --tensors and "
                "--method out"
            )
        if len(self.fit) not in (0, 1, len(self.models)):
            raise ConfigError(
                f"merge: --fit is given {len(self.fit)} times for {len(self.models)} models; give "
                "one file for all, or one per model in their order"
            )
        for pattern, weights in self.tensors.items():
            if len(weights) != len(self.models):
                raise ConfigError(
                    f"merge: --tensors {pattern} has {len(weights)} weights for {len(self.models)} "
                    "models; give one weight per model"
                )
        if self.tensors and self.method != "linear":
            raise ConfigError("merge: --tensors goes with the linear method alone")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ConfigError(
                f"merge: {len(self.models)} models and {len(self.weights)} weights; give one "
                "weight per model"
            )
        if self.method == "slerp" and min(self.all_weights) <= 0:
            raise ConfigError(f"merge: slerp needs weights above 0, got {list(self.all_weights)}")
        if len(set(self.shares)) != len(self.shares):
            raise ConfigError(f"merge: a share stands twice: {list(self.shares)}")

    @property
    def all_weights(self) -> Sequence[float]:
        """The weights as they are used, by default 1 / (number of models)."""
        return self.weights or [1 / len(self.models)] * len(self.models)

    def weights_of(self, tensor: str) -> Sequence[float]:
        """The weights of the models in one tensor."""
        for pattern, weights in self.tensors.items():
            if fnmatchcase(tensor, pattern):
                return weights
        return self.all_weights


def merge_models(request: MergeRequest) -> list[Path]:
    """Write the merged model of every share, with its tokenizer and a merge.json that says of what
    it was made, and return their folders.

    Computed in float32 and cast to the start's dtype at the end. All appears whole or not at all.
    ConfigError where nothing says what the models started from, ModelError for models with other
    tensors or another tokenizer, ResourceError where the disk refuses.
    """
    start_name = request.toward or _common_start(request.models)
    loaded = load_finished(start_name)
    network: Any = _folded(loaded.network)
    start = _tensors(network)

    _check_patterns(request, start)
    models = []
    for name in request.models:
        other = load_finished(name)
        if not same_vocabulary(loaded.tokenizer, other.tokenizer):
            raise ModelError(f"merge: {name} and {start_name} have different tokenizers")
        tensors = _tensors(_folded(other.network))
        _check_same_tensors(start, tensors, start_name, name)
        models.append(tensors)

    fitted = None
    if request.fit:
        prompts = read_prompts(request.fit, len(models), loaded.tokenizer)
        laws = model_laws(network, start, models, prompts)
        fitted = fit_weights(laws, [len(given) for given in prompts])
        request = replace(request, weights=fitted.weights, fit=())

    settings = _settings(start_name)
    several = len(request.shares) > 1
    with files.writing(request.to), files.replaced_folder(request.to) as temporary:
        for share in request.shares:
            folder = temporary / f"{share:g}" if several else temporary
            folder.mkdir(exist_ok=True)
            merged = {
                name: merged_tensor(value, [model[name] for model in models], request, share, name)
                for name, value in start.items()
            }
            _save(network, merged, settings, folder)
            loaded.tokenizer.save_pretrained(folder)
            files.write_json(
                folder / MERGE_FILE, {**_record(request, start_name, share), **_fit_record(fitted)}
            )
    return [request.to / f"{share:g}" if several else request.to for share in request.shares]


def merged_tensor(
    start: Tensor, models: Sequence[Tensor], request: MergeRequest, share: float, name: str = ""
) -> Tensor:
    """One tensor of the merged model, called `name`, in the shape and dtype of `start`.

    By slerp one model after the other is added, the k-th with its share of the weights so far (1/k
    where all are equal); then `share` of the way from the start to there is taken.
    """
    weights = request.weights_of(name)
    if request.method == "linear":
        return linear(start, models, weights, share)

    merged = models[0]
    for place in range(1, len(models)):
        part = weights[place] / sum(weights[: place + 1])
        merged = slerp(start, merged, models[place], part)
    return linear(start, [merged], [1.0], share)


def merge_of(name: str) -> dict[str, Any]:
    """Of what merge a model is, for those that are joined to one curve: {"merge": {"of", "share"}};
    nothing for a model that `alignkit merge` did not write.
    """
    file = find_finished(name) / MERGE_FILE
    if not file.is_file():
        return {}
    record = json.loads(file.read_text())
    share = record.pop("share")
    return {"merge": {"of": files.sha256_of_json(record)[:16], "share": share}}


def _check_patterns(request: MergeRequest, start: Tensors) -> None:
    """ConfigError for a pattern that no tensor has the name of."""
    for pattern in request.tensors:
        if not any(fnmatchcase(name, pattern) for name in start):
            shown = ", ".join(list(start)[:4])
            raise ConfigError(
                f"merge: no tensor is called {pattern}; the model has {shown}, ... and * stands for "
                "any part of a name"
            )


def _common_start(models: Sequence[str]) -> str:
    """What the models were trained from, by their recipes or adapters."""
    starts = {name: _start_of(name) for name in models}
    known = {start for start in starts.values() if start}
    if len(known) != 1 or None in starts.values():
        listed = ", ".join(f"{name} from {start or '?'}" for name, start in starts.items())
        raise ConfigError(
            f"merge: nothing says which one model all were trained from ({listed}); name it with "
            "--toward MODEL"
        )
    return known.pop()


def _start_of(name: str) -> str | None:
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
        if recipe.model.adapter is not None and recipe.model.adapter.path:
            return recipe.model.adapter.path
        if recipe.model.name_or_path != "task":
            return recipe.model.name_or_path
        return recipe.data.task_source() or f"task:{DEFAULT_TASK}"

    if (folder / "adapter_config.json").is_file():
        from peft import PeftConfig

        return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    return None


def _folded(network: Any) -> Any:
    """A model without an adapter: one that it has is folded into its weights."""
    return network.merge_and_unload() if hasattr(network, "peft_config") else network


def _tensors(network: Any) -> Tensors:
    """Parameters and saved buffers; what is tied is listed by its first name."""
    state = network.state_dict()
    parameters = dict(network.named_parameters())
    every_name = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in state.items() if name not in every_name}
    return {name: value.detach().clone() for name, value in {**parameters, **buffers}.items()}


def _check_same_tensors(start: Tensors, other: Tensors, start_name: str, name: str) -> None:
    """ModelError unless both have tensors of the same names and shapes."""
    shapes = {key: tuple(value.shape) for key, value in start.items()}
    others = {key: tuple(value.shape) for key, value in other.items()}
    if shapes != others:
        key = next(key for key in [*shapes, *others] if shapes.get(key) != others.get(key))
        raise ModelError(
            f"merge: {name} and {start_name} are not the same kind of model: {key} is "
            f"{others.get(key, 'missing')} and {shapes.get(key, 'missing')}"
        )


def _settings(start: str) -> dict[str, Any]:
    """The dtype and the dropout rates of the start's config: loading changed both."""
    folder = find_finished(start)
    name = str(folder) if folder.exists() else start
    if (folder / "adapter_config.json").is_file():
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(name).base_model_name_or_path or name
    config = AutoConfig.from_pretrained(name)
    rates = {
        key: value for key, value in config.to_dict().items() if key.endswith(("dropout", "_pdrop"))
    }
    return {**rates, "dtype": config.dtype or torch.float32}


@torch.no_grad()
def _save(network: Any, merged: Tensors, settings: Mapping[str, Any], folder: Path) -> None:
    """Write the network with other tensors; tied ones stay tied."""
    network.load_state_dict(merged, strict=False)
    for key, value in settings.items():
        setattr(network.config, key, value)

    by_place: dict[int, Tensor] = {}
    state = {}
    for name, value in network.state_dict().items():
        dtype = settings["dtype"] if value.is_floating_point() else value.dtype
        state[name] = by_place.setdefault(value.data_ptr(), value.to(dtype))
    network.save_pretrained(folder, state_dict=state)


def _fit_record(fitted: WeightFit | None) -> dict[str, Any]:
    """How far the merge is from its models, in nats, where its weights were fitted."""
    if fitted is None:
        return {}
    return {"divergence": {"equal_weights": fitted.equal, "fitted": fitted.fitted}}


def _record(request: MergeRequest, start: str, share: float) -> dict[str, Any]:
    """What a merged model was made of, as JSON."""
    models = [
        {"name": name, "weight": weight, "sha256": content_hash(find_finished(name))}
        for name, weight in zip(request.models, request.all_weights)
    ]
    return {
        "method": request.method,
        "models": models,
        "start": {"name": start, "sha256": content_hash(find_finished(start))},
        "share": share,
        **(
            {"tensors": {key: list(value) for key, value in request.tensors.items()}}
            if request.tensors
            else {}
        ),
    }
