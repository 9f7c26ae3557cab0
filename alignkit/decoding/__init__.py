"""Aligned samples without training: laws of decoders, particles, fusion of several models, and the
ranking of candidates.
"""

from alignkit.decoding.consensus import consensus
from alignkit.decoding.fusion import dynamic_weight, fuse
from alignkit.decoding.laws import best_of_n, quasi_rejection, soft_best_of_n
from alignkit.decoding.particles import particle_step
from alignkit.decoding.steering import steering_step

__all__ = [
    "best_of_n",
    "consensus",
    "dynamic_weight",
    "fuse",
    "particle_step",
    "quasi_rejection",
    "soft_best_of_n",
    "steering_step",
]
