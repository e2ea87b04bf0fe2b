"""Cases of one test, of which the quick suite takes the first few and the slow one the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(cases: Iterable[Any], quick: int | Iterable[int] = 1) -> list[Any]:
    """Values for `parametrize`: all but the first `quick` of them, or those at the places `quick`, are marked slow."""
    places = range(quick) if isinstance(quick, int) else set(quick)

    def marked(place: int, case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return case if place in places else pytest.param(*values, marks=pytest.mark.slow)

    return [marked(place, case) for place, case in enumerate(cases)]
