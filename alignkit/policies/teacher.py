"""The teacher: a frozen model with the policy's tokenizer, which distillation learns from."""

from alignkit.config.model import ModelConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.errors import ModelError
from alignkit.policies.load import load_anchor
from alignkit.policies.module import PolicyModule, causal_lm, context_length
from alignkit.policies.pair import PolicyPair
from alignkit.policies.probe import check_head, choose_layout, mass_beyond, probe_bundle
from alignkit.policies.reference import Anchor
from alignkit.policies.tokenizer import check_vocabulary, same_vocabulary

FIELD = "teacher.name_or_path"
LARGEST_CUT = 1e-3  # probability on tokens that only one of the two models has


def add_teacher(pair: PolicyPair, teacher: TeacherConfig, model: ModelConfig) -> None:
    """Load the teacher and make it an anchor of `pair`.

    Both models must have one tokenizer. Their embeddings may be padded to different sizes: the
    longer one is cut where they are compared. `model` is the policy's section, which lends its
    attention kernel and what it may run. Raises ModelError (exit 4).
    """
    source = ModelConfig(
        name_or_path=teacher.name_or_path,
        revision=teacher.revision,
        dtype=teacher.dtype,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )
    own_dtype = str(next(pair.base.parameters()).dtype).removeprefix("torch.")
    module, tokenizer = load_anchor(
        source, FIELD, device=pair.device, dtype=own_dtype, shards=pair.shards
    )
    if not same_vocabulary(tokenizer, pair.tokenizer):
        raise ModelError(
            f"{FIELD}: the tokenizer of {teacher.name_or_path} ({len(tokenizer)} tokens) is not "
            f"the policy's ({len(pair.tokenizer)} tokens): it would read other texts than the "
            "policy wrote; choose a teacher of the same family"
        )
    check_vocabulary(causal_lm(module.model), tokenizer, teacher.name_or_path, FIELD)

    shared = min(pair.vocab_size, _size(module))
    _check_context(module, pair, teacher.name_or_path)
    probe = probe_bundle(shared, max((w for w in module.windows.values() if w), default=None), 128)
    check_head(module, probe)
    _check_cut(module, pair, shared, teacher.name_or_path)
    module.vocabulary = shared
    module.temperature = pair.base.temperature

    # A row is laid out once for all models, so the teacher has to be able to branch too.
    if pair.layout != "padded":
        pair.layout, note = choose_layout(module, model.layout, probe)
        pair.notes += [f"{note} (the teacher)"] if note else []
    pair.anchors["teacher"] = Anchor("frozen", module)


def _size(module: PolicyModule) -> int:
    """Rows of a model's head."""
    size: int = causal_lm(module.model).config.get_text_config().vocab_size
    return size


def _check_context(module: PolicyModule, pair: PolicyPair, name: str) -> None:
    """Note where the teacher reads fewer tokens at once than the policy."""
    own, theirs = (context_length(causal_lm(m.model)) for m in (pair.base, module))
    if theirs < own:
        pair.notes.append(
            f"the teacher {name} reads {theirs} tokens at once, the policy {own}: keep prompt and "
            "completion within the teacher's (data.max_length, rollout.max_new_tokens)"
        )


def _check_cut(module: PolicyModule, pair: PolicyPair, shared: int, name: str) -> None:
    """Say how much probability is cut off where one vocabulary is padded to more than the other;
    ModelError where it is not padding.
    """
    sizes = (pair.vocab_size, _size(module))
    if sizes[0] == sizes[1]:
        return

    larger = pair.base if sizes[0] > sizes[1] else module
    mass = mass_beyond(larger, shared, probe_bundle(shared, None, 128))
    if not mass <= LARGEST_CUT:
        raise ModelError(
            f"{FIELD}: {name} has a vocabulary of {sizes[1]}, the policy one of {sizes[0]}, and "
            f"the larger model gives up to {mass:.1e} of its probability to tokens that the other "
            "one does not have; choose a teacher whose further tokens are padding"
        )
    pair.notes.append(
        f"vocabularies of {sizes[0]} (policy) and {sizes[1]} (teacher): compared on the first "
        f"{shared} tokens, which leaves out a probability of at most {mass:.1e}"
    )
