"""DPH and BOND: two draws in one step, expected gradients by enumeration, and where BOND ends."""

import math
from itertools import product

import pytest
import torch

from alignkit import BOND, DPH, GRPO
from alignkit.batches import RolloutBatch
from alignkit.decoding import best_of_n
from alignkit.oracles.gradients import gradient, sequence_kl
from alignkit.oracles.optima import minimise
from alignkit.policies.tabular import Tree
from alignkit.testing import check_objective

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("objective", [*DPH.examples(), *BOND.examples()], ids=repr)
def test_every_setting_holds(objective):
    assert check_objective(objective)


def tables(tree, *, seed=0, count=2):
    noise = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tree.states, tree.vocab, generator=noise, dtype=torch.float64)
        for _ in range(count)
    ]


def step(tree, theta, anchors, objective, rows, scores, draws, groups, behavior=None):
    """The responses `rows` [N] of the tree as one rollout."""
    tokens = tree.token_logps(theta, anchors, objective.plan).select(rows)
    sampler = tree.logps(theta if behavior is None else behavior).detach()[rows]
    tokens = type(tokens)(tokens.policy, tokens.anchors, tokens.mask, sampler)
    return RolloutBatch(tokens, scores[rows], groups, draws=draws)


def values(objective, batch):
    """The weighted loss values of every completion, [N]."""
    credited, _ = objective.credit(
        RolloutBatch(
            batch.tokens.map(torch.Tensor.detach), batch.scores, batch.groups, draws=batch.draws
        ),
        objective.init_state(),
    )
    filled = RolloutBatch(
        batch.tokens, batch.scores, batch.groups, credited.advantages, draws=batch.draws
    )
    terms = objective.loss(filled).terms
    return sum(t.weight * (t.values if t.values.dim() == 1 else t.values.sum(-1)) for t in terms)


def test_dphs_rehearsal_is_the_sequence_forward_kl():
    """The kept answers weighed by the reference: the sum of f over tokens has the gradient of
    KL(reference || policy) over whole responses.
    """
    tree = Tree.build(3, 3)
    theta, reference = tables(tree)
    objective = DPH(weight=0.3, aggregation="sequence_sum")
    n = len(tree.tokens)
    scores = torch.zeros(n, dtype=torch.float64)
    kept = torch.ones(n, dtype=torch.long)
    probability = tree.sequence_logps(reference).exp()

    def loss(point):
        batch = step(
            tree, point, {"reference": reference}, objective, torch.arange(n), scores, kept, kept
        )
        return (probability * values(objective, batch)).sum()

    wanted = gradient(lambda point: sequence_kl(tree, point, reference, "forward"), theta)
    torch.testing.assert_close(gradient(loss, theta), 0.3 * wanted, **EXACT)


def test_dph_explores_as_grpo_and_rehearses_solved_prompts_alone():
    tree = Tree.build(4, 1, eos=False)
    theta, reference = tables(tree)
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    # Two prompts; the kept answer is the last of each: response 3 scores 3, response 0 scores 0.
    rows = torch.tensor([0, 1, 3, 1, 2, 0])
    draws = torch.tensor([0, 0, 1, 0, 0, 1])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    anchors = {"reference": reference}

    def of(objective):
        return values(objective, step(tree, theta, anchors, objective, rows, scores, draws, groups))

    every, apart = of(DPH(weight=1.0)), of(DPH(weight=1.0, solved=2.0))
    own = rows[draws == 0]
    alone = GRPO(beta=0.0)
    plain = step(tree, theta, anchors, alone, own, scores, None, groups[draws == 0])
    torch.testing.assert_close(every[draws == 0], values(alone, plain), **EXACT)
    assert (every[draws == 1] > 0).all()

    # The first prompt is solved: its own completions teach nothing, and its kept answer does.
    assert apart[:2].tolist() == [0, 0]
    assert apart[2] == every[2]
    assert torch.equal(apart[3:5], every[3:5])
    assert apart[5] == 0


def expected(objective, tree, theta, anchor, scores, own=1):
    """The expectation of one prompt's loss over all own samples and all samples of the anchor."""
    n = len(tree.tokens)
    groups = torch.tensor(list(product(range(n), repeat=own + objective.n)))
    draws = torch.tensor([0] * own + [1] * objective.n).repeat(len(groups))
    index = torch.arange(len(groups)).repeat_interleave(own + objective.n)
    sampler = tree.sequence_logps(theta.detach())
    drawn = tree.sequence_logps(anchor)
    log_weight = sampler[groups[:, :own]].sum(-1) + drawn[groups[:, own:]].sum(-1)

    batch = step(tree, theta, {"target": anchor}, objective, groups.flatten(), scores, draws, index)
    per_prompt = values(objective, batch).view(len(groups), -1).mean(-1)
    return (log_weight.exp() * per_prompt).sum()


def tree_best(tree, anchor, scores, n):
    law = best_of_n(tree.sequence_logps(anchor).exp(), scores, n)
    return law, tree.conditionals(law.log())


def test_bond_imitates_the_best_of_n_and_iterating_it_gives_the_best_of_2_to_the_k():
    """Exact steps on the forward half with a moving anchor; rewards in strict order."""
    tree = Tree.build(4, 1, eos=False)
    start = tables(tree)[0]
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    objective = BOND(mixture=0.0, baseline="none")
    anchor = start

    for k in range(1, 4):
        found = minimise(
            lambda theta, held=anchor: expected(objective, tree, theta, held, scores), anchor
        )
        law = best_of_n(tree.sequence_logps(start).exp(), scores, 2**k)
        torch.testing.assert_close(tree.sequence_logps(found).exp(), law, rtol=0, atol=1e-6)
        anchor = found


@pytest.mark.parametrize("reward", ["j_bond", "quantile"])
@pytest.mark.parametrize("own", [1, 2])
def test_bonds_gradient_is_that_of_its_jeffreys_divergence(reward, own):
    """(1 - b) KL(best of n || pi) and b E[-r] + (b + gamma) KL(pi || anchor), by enumeration."""
    tree = Tree.build(4, 1, eos=False)
    theta, anchor = tables(tree)
    scores = torch.tensor([0.3, -1.0, 2.0, 0.3], dtype=torch.float64)  # one tie
    baseline = "leave_one_out" if own > 1 else "none"
    objective = BOND(reward=reward, mixture=0.3, gamma=0.2, baseline=baseline)
    probability = tree.sequence_logps(anchor).exp()
    law, best = tree_best(tree, anchor, scores, 2)
    assert abs(float(law.sum()) - 1) < 1e-12

    rewards = torch.zeros(4, dtype=torch.float64)
    for first, second in product(range(4), repeat=2):
        weight = probability[first] * probability[second]
        for y in range(4):
            if reward == "j_bond":
                below = scores[y] < min(scores[first], scores[second])
                rewards[y] += weight * (-math.log(16) if below else 0.0)
            else:
                share = sum(float(scores[a] <= scores[y]) for a in (first, second)) / 2
                rewards[y] += weight * math.log(max(share, 0.25))

    def wanted(point):
        forward = sequence_kl(tree, point, best, "forward")
        backward = sequence_kl(tree, point, anchor)
        gain = (tree.sequence_logps(point).exp() * rewards).sum()
        return 0.7 * forward - 0.3 * gain + 0.5 * backward

    found = gradient(lambda point: expected(objective, tree, point, anchor, scores, own), theta)
    torch.testing.assert_close(found, gradient(wanted, theta), **EXACT)


def test_the_declared_optimum_is_best_of_n_also_with_ties():
    reference = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.3], dtype=torch.float64)
    exact = BOND(reward="quantile", n=3)
    found = exact.optimum(rewards, reference.log()).exp()
    for row, law in zip(reference, found):
        torch.testing.assert_close(law, best_of_n(row, rewards, 3), **EXACT)

        # KL and win rate of best-of-n are bounded.
        assert (law * (law / row).log()).sum() <= math.log(3) - 2 / 3
    assert BOND().optimum(rewards, reference.log()) is None
    with pytest.raises(ValueError, match="j_bond is made for n = 2"):
        BOND(n=3)
