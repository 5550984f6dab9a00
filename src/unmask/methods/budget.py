"""Budgets: how many weights are unmasked, as a count or as a share of a model's weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from unmask.errors import MethodError


@dataclass(frozen=True)
class Budget:
    """A number of weights: a count, or a share of a model's weights. `Budget.parse` reads one.

    Attributes:
        number: The count, or the share as an exact fraction above 0 and at most 1.
        relative: True for a share.
        of_eligible: True for a share of the eligible weights; False for a share of all weights of the model.
        text: The budget as it was written. It does not count in comparisons.
    """

    number: Fraction
    relative: bool = False
    of_eligible: bool = False
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, budget: BudgetLike) -> Budget:
        """Reads a budget.

        Args:
            budget: A count (``320_000``, ``"320K"``), or a share: ``"0.17%"``, or the ratio of two counts,
                ``"320K of 184M"``, which carries a budget that was set on one model over to another. A share is of the
                model's weights. With ``" of eligible"`` or ``" eligible"`` at its end (``"4% of eligible"``,
                ``"320K of 1.33M eligible"``) it is of those that the method may select among: inside a LoRA, of the LoRA's.

        Raises:
            MethodError: The budget is not a positive count or a share in (0%, 100%].

        Example:
            >>> Budget.parse("320K") == Budget.parse(320_000), str(Budget.parse("0.17%"))
            (True, '0.17%')
        """
        if isinstance(budget, Budget):
            return budget
        text = "" if isinstance(budget, bool) or not isinstance(budget, (int, str)) else str(budget)
        form = _FORM.fullmatch(text) if len(text) < 100 else None
        if form is None:
            raise MethodError(
                f"budget = {budget!r}; give a count (320_000, '320K') or a share of the parameters ('0.17%', "
                "'320K of 184M', '4% of eligible')."
            )
        number, other = _number(form["number"], form["unit"]), _number(form["of"] or "1", form["of_unit"])
        if form["unit"] != "%" and not form["of"]:
            if form["eligible"] or number.denominator != 1 or number < 1:
                raise MethodError(f"budget = {text}; a count must be a whole number, at least 1.")
            return cls(number, text=text)
        if not other or not 0 < number / other <= 1:
            raise MethodError(f"budget = {text!r}; a share must be above 0% and at most 100%.")
        return cls(number / other, relative=True, of_eligible=bool(form["eligible"]), text=text)

    def of(self, total: int, eligible: int | None = None) -> int:
        """Returns the count. A share is rounded to the nearest count, at least 1.

        Args:
            total: The model's number of scalar parameters.
            eligible: How many of them are eligible; None where that is not known.

        Raises:
            MethodError: The budget is a share of the eligible weights, and their number is not known.

        Example:
            >>> Budget.parse("0.1%").of(20_000), Budget.parse("103K of 184M").of(22_700_000)
            (20, 12707)
            >>> Budget.parse("4% of eligible").of(900, eligible=500)
            20
        """
        if not self.relative:
            return int(self.number)
        whole = eligible if self.of_eligible else total
        if whole is None:
            raise MethodError(
                f"budget = {self.text!r} is a share of the eligible weights, whose number is not known here; give a count or "
                "a share of the model's weights."
            )
        return max(1, round(self.number * whole))

    def __str__(self) -> str:
        return self.text


BudgetLike = Budget | int | str


def _number(digits: str, unit: str | None) -> Fraction:
    """Returns the exact value of digits with a unit."""
    number = Fraction(digits.replace("_", ""))
    return number / 100 if unit == "%" else number * _UNITS[(unit or "").upper()]


_UNITS = {"": 1, "K": 1_000, "M": 10**6, "B": 10**9}
_DIGITS = r"\d+(?:_\d+)*(?:\.\d+)?"
_FORM = re.compile(
    rf"\s*(?P<number>[+-]?{_DIGITS})\s*(?P<unit>[%KMBkmb])?(?:\s+of\s+(?P<of>{_DIGITS})\s*(?P<of_unit>[KMBkmb])?)?"
    r"(?P<eligible>\s+(?:of\s+)?eligible)?\s*"
)
