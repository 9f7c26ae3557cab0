"""Errors of alignkit: each says what was given, what is
allowed and what to do, and carries its exit code.
"""


class AlignkitError(Exception):
    """Base class. `exit_code` is what the command line returns when the error reaches it."""

    exit_code = 1


class ConfigError(AlignkitError, ValueError):
    """A recipe, an override, an argument or a hyper-parameter is not allowed."""

    exit_code = 2


class ShapeError(ConfigError):
    """Tensors given to a pure function do not have the shapes it documents."""


class DataError(AlignkitError, ValueError):
    """Rows that cannot be trained on: missing columns, wrong types, nothing left."""

    exit_code = 3


class ModelError(AlignkitError, ValueError):
    """A model or tokenizer that cannot be used as asked."""

    exit_code = 4


class NumericsError(AlignkitError, ArithmeticError):
    """A loss, gradient, reward or log-prob stopped being finite."""

    exit_code = 5


class CheckpointError(AlignkitError, RuntimeError):
    """No valid checkpoint, or one that does not belong to this run."""

    exit_code = 6


class ResourceError(AlignkitError, RuntimeError):
    """Memory, disk, a lock, an engine or an endpoint is not available."""

    exit_code = 7


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
