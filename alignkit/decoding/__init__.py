"""Aligned samples without training: laws of decoders, particles and the fusion of several models."""

from alignkit.decoding.fusion import fuse
from alignkit.decoding.laws import best_of_n, quasi_rejection, soft_best_of_n
from alignkit.decoding.particles import particle_step

__all__ = ["best_of_n", "fuse", "particle_step", "quasi_rejection", "soft_best_of_n"]
