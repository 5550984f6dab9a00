"""Counts the gradient updates of a run: the sum over the steps of the weights that each step updates."""

from __future__ import annotations

from unmask.errors import MethodError
from unmask.methods.method import Method
from unmask.methods.schedules import Schedule


def gradient_updates(of: Method | Schedule, budget: int, steps: int | None = None) -> int:
    """Returns the number of scalar weight updates of a run: ``sum_{t<T} b(t)``, exact for any schedule and stride.

    For the uniform schedule with T dividing B this is ``B (T + 1) / 2``, against ``T B`` of a static mask: the paper's
    argument for increment-S.

    Args:
        of: A method or a schedule. Static selection and repeat-S update B weights at every step. Where repeat-S keeps the
            weights that leave, this counts the B weights that have a gradient, and not those that only momentum still moves.
        budget: B, as a count.
        steps: T, the number of steps of the run; None for those that the schedule plans (a static method plans none).

    Raises:
        MethodError: ``budget`` or ``steps`` is negative, or ``steps`` is missing.

    Example:
        >>> import unmask
        >>> gradient_updates(unmask.id3(budget=100, steps=10), 100), gradient_updates(unmask.pafi(100), 100, steps=10)
        (550, 1000)
    """
    if isinstance(of, Method) and of.whole:
        raise MethodError(f"{of.name} trains whole tensors: budget x steps updates, with no schedule.")
    if steps is None:
        if isinstance(of, Method) and of.strategy != "increment":
            raise MethodError(f"{of.name} plans no number of steps; give steps=, those that are run.")
        steps = (of.schedule if isinstance(of, Method) else of).steps
    for name, value in (("budget", budget), ("steps", steps)):
        if value < 0:
            raise MethodError(f"{name} = {value}; it must be 0 or more.")
    return sum(of.cumulative(t, budget) for t in range(steps))
