"""Aligned samples without training: laws of decoders, particles, fusion of several models, and the
ranking of candidates.
"""

from alignkit.decoding.consensus import consensus
from alignkit.decoding.fusion import dynamic_weight, fuse, selective_contrast
from alignkit.decoding.laws import best_of_n, quasi_rejection, soft_best_of_n
from alignkit.decoding.particles import particle_step
from alignkit.decoding.steering import steering_step
from alignkit.decoding.voting import answers_needed, model_switch, semantic_entropy

__all__ = [
    "answers_needed",
    "best_of_n",
    "consensus",
    "dynamic_weight",
    "fuse",
    "model_switch",
    "particle_step",
    "quasi_rejection",
    "selective_contrast",
    "semantic_entropy",
    "soft_best_of_n",
    "steering_step",
]
