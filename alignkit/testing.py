"""The conformance suite: what every objective, built in or a user's own, has to hold, with the
figure that shows it.
"""

from collections.abc import Sequence
from importlib import import_module

from alignkit.config.escaping import plain
from alignkit.config.plugins import load_object
from alignkit.errors import AlignkitError, ConfigError
from alignkit.objectives import OBJECTIVES, locate, unknown_objective
from alignkit.objectives.base import Objective
from alignkit.oracles import claims, invariances
from alignkit.oracles.invariances import Check

__all__ = ["Check", "ConformanceError", "check_objective", "run_checks", "verify"]


class ConformanceError(AlignkitError, AssertionError):
    """An objective fails the conformance suite; `checks` holds all of its checks."""

    def __init__(self, objective: Objective, checks: Sequence[Check]):
        self.checks = list(checks)
        lines = [
            f"  {c.name}: {c.figure:.2e}, allowed {c.bound:.0e}. {c.detail}"
            for c in checks
            if not c.passed
        ]
        super().__init__("\n".join([f"{objective!r} fails the conformance suite:", *lines]))


def check_objective(objective: Objective) -> list[Check]:
    """All checks of `objective` where every one passed; ConformanceError (an AssertionError) naming
    the failures otherwise.

    >>> from alignkit import DPO
    >>> all(check.passed for check in check_objective(DPO(beta=0.1)))
    True
    """
    checks = run_checks(objective)
    if not all(check.passed for check in checks):
        raise ConformanceError(objective, checks)
    return checks


def run_checks(objective: Objective) -> list[Check]:
    """Every check that applies to `objective`, passed or not."""
    parts = (*invariances.CHECKS, *claims.COMMON, *claims.BY_FAMILY.get(objective.plan.data, ()))
    return [check for part in parts for check in part(objective)]


def verify(names: Sequence[str] = (), *, safe: bool = False) -> int:
    """Check the objectives called `names` (`module:Class` and `file.py:Class` for one's own;
    default: all built-in ones) in all their example settings and print a table. Returns the exit
    code: 0, or 1 where a check failed. ConfigError for unknown names.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("objective", "check", "figure", "allowed", "verdict")
    failed = total = 0
    classes = [_find(name, safe) for name in names or OBJECTIVES]
    for cls in classes:
        for objective in cls.examples():
            title = repr(objective)
            for check in run_checks(objective):
                verdict = plain("holds" if check.passed else f"FAILS {check.detail}")
                verdict.stylize("green" if check.passed else "red")
                table.add_row(
                    plain(title),
                    plain(check.name),
                    f"{check.figure:.1e}",
                    f"{check.bound:.0e}",
                    verdict,
                )
                failed = failed + (not check.passed)
                total = total + 1
                title = ""
            table.add_section()
    console = Console()
    console.print(table)
    console.print(f"{total - failed} of {total} checks hold, {len(classes)} objectives")
    return 1 if failed else 0


def _find(name: str, safe: bool) -> type[Objective]:
    """The class of a built-in objective or of one's own. ConfigError where there is none."""
    if name in OBJECTIVES:
        module, cls, _ = locate(name)
        return getattr(import_module(module), cls)

    if ":" in name:
        loaded = load_object(name, what="verify", safe=safe)
        if isinstance(loaded, type) and issubclass(loaded, Objective):
            return loaded
        raise ConfigError(
            f"verify: `{name}` is not a subclass of alignkit.objectives.base.Objective"
        )

    raise unknown_objective(name)
