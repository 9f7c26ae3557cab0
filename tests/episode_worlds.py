"""Small worlds and a player for tests of episodes: the tiny model of world.py takes turns in them."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.config.data import DataConfig
from alignkit.rollout.environment_pool import LocalEnvironments
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.renderer import TextRenderer
from alignkit.rollout.turns import TurnSampler


class Echo:
    """Says the last word again, with a reward for each w5; ends with the fourth turn."""

    def reset(self, **row):
        self.turn = 0

    def step(self, text):
        self.turn += 1
        words = text.split() or ["w3"]
        return f" {words[-1]} w7", float(words.count("w5")), self.turn == 4

    def state(self):
        return str(self.turn)


class DoneAtOnce:
    """Every episode is one answer."""

    def reset(self, **row):
        pass

    def step(self, text):
        return "", float(text.split().count("w5")), True


def prompts(n, start=3):
    return [
        SimpleNamespace(
            ids=torch.tensor([start + i, 4]),
            text=f"w{start + i} w4",
            uid=f"row {i}",
            columns={"n": i},
        )
        for i in range(n)
    ]


def loaded(folder):
    return OneModel(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )


def player(models, environment, *, turns=8, cap=60, seed=0, renderer=None, budget=65536):
    return TurnSampler(
        HFSampler(models, max_new_tokens=cap, seed=seed, token_budget=budget),
        LocalEnvironments(environment),
        renderer or TextRenderer(models.tokenizer, DataConfig()),
        turns=turns,
        max_new_tokens=cap,
        context=128,
        seed=seed,
    )
