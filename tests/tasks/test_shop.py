"""The shop: its exact figures against enumeration and against episodes that were played."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.renderer import TextRenderer
from alignkit.rollout.turns import TurnSampler
from alignkit.tasks import TASKS, resolve
from alignkit.tasks.shop import MOST_TURNS, NONSENSE, SHELVES, TURNS, ShopWorld
from alignkit.tasks.shop_exact import folder_laws, shop_figures, shop_optimum

BETA = 0.1


def random_laws(seed):
    """Laws of two wishes; before the first look all shelves read alike."""
    noise = torch.Generator().manual_seed(seed)
    laws = []
    for looks in range(MOST_TURNS):
        shelves = len(SHELVES) if looks else 1
        logits = torch.randn(2, shelves, 5, dtype=torch.float64, generator=noise)
        laws.append(logits.log_softmax(-1).expand(-1, len(SHELVES), -1))
    return laws


def played(shelf, turns):
    """Reward of an episode with these turns, played in the environment itself; None where it does
    not end with the last of them.
    """
    world = ShopWorld()
    world.seed(shelf)
    world.reset()
    total = 0.0
    for number, turn in enumerate(turns):
        _, reward, done = world.step((*TURNS, "milk milk")[turn])
        total += reward
        if done:
            return total if number + 1 == len(turns) else None
    return None


def enumerated(policy, reference):
    """E[R], the KL of whole episodes and their total probability, from every episode there is."""
    reward = torch.zeros(2, dtype=torch.float64)
    divergence = reward.clone()
    mass = reward.clone()
    for shelf in range(len(SHELVES)):
        for length in range(1, MOST_TURNS + 1):
            for turns in itertools.product(range(5), repeat=length):
                gained = played(shelf, turns)
                if gained is None:
                    continue
                logp = sum(policy[looks][:, shelf, turn] for looks, turn in enumerate(turns))
                ref = sum(reference[looks][:, shelf, turn] for looks, turn in enumerate(turns))
                probability = logp.exp() / len(SHELVES)
                reward += probability * gained
                divergence += probability * (logp - ref)
                mass += probability
    return reward, divergence, mass


def test_the_figures_are_those_of_all_episodes_enumerated():
    policy, reference = random_laws(1), random_laws(2)
    reward, divergence, mass = enumerated(policy, reference)
    assert torch.allclose(mass, torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    exact = shop_figures(policy, reference, BETA)
    assert exact.reward == pytest.approx(float(reward.mean()), abs=1e-12)
    assert exact.kl == pytest.approx(float(divergence.mean()), abs=1e-12)
    assert exact.objective == pytest.approx(exact.reward - BETA * exact.kl, abs=1e-12)


def test_the_optimum_is_reached_by_its_laws_and_by_no_others():
    reference = random_laws(2)
    laws, best = shop_optimum(reference, BETA)
    assert shop_figures(laws, reference, BETA).objective == pytest.approx(best, abs=1e-12)
    for seed in range(20):
        nearby = [
            (law + 0.05 * noise).log_softmax(-1) for law, noise in zip(laws, random_laws(seed))
        ]
        assert shop_figures(nearby, reference, BETA).objective < best
    assert shop_figures(reference, reference, BETA).share == pytest.approx(0, abs=1e-12)


def test_the_world_is_the_one_that_its_tool_describes():
    world = ShopWorld()
    world.seed(1)
    world.reset()
    assert world.state() == "new"
    assert world.step(" look") == (" shelf middle", -0.1, False)
    assert world.state() == "1 middle"
    assert world.step("take middle") == ("", 1.0, True)
    world.reset()
    assert world.step("take left") == ("", 0.0, True)
    assert world.step("look look") == ("", NONSENSE, True)


@pytest.mark.long
def test_played_episodes_agree_with_the_exact_figures():
    task = resolve("shop_small")
    models = OneModel(
        AutoModelForCausalLM.from_pretrained(task.model_folder),
        AutoTokenizer.from_pretrained(task.model_folder),
    )
    shop = TASKS["shop_small"]
    prompts = [
        SimpleNamespace(
            ids=torch.tensor(models.tokenizer(text)["input_ids"]), text=text, uid=text, columns={}
        )
        for text in shop.prompts
    ]
    sampler = TurnSampler(
        HFSampler(models, max_new_tokens=24),
        LocalEnvironments(ShopWorld),
        TextRenderer(models.tokenizer, DataConfig()),
        turns=8,
        max_new_tokens=24,
        context=64,
        seed=0,
    )
    rewards = [
        episode.reward
        for step in range(24)
        for row in sampler.episodes(prompts, Draw(16), step=step, prompt_ids=range(len(prompts)))
        for episode in row
    ]
    laws = folder_laws(task.model_folder, shop)
    wanted = shop_figures(laws, laws, BETA).reward
    sampled = torch.tensor(rewards)
    # Groups of 16 share a shelf, so the error is at most that of independent groups.
    error = sampled.view(-1, 16).mean(-1).std() / (len(rewards) / 16) ** 0.5
    assert abs(float(sampled.mean()) - wanted) < 4 * float(error)
