"""Hooks that schemathesis loads for `benchmarks.fuzz`: what was sent to each operation, and what came of it.

Written as JSON to `counts.json` in the working directory when schemathesis ends: of each operation the requests by
phase, the statuses of its answers, what became of the requests that the document allows (`accepted`, or the field that
was refused), the seconds of all answers and of the longest.
"""

from __future__ import annotations

import atexit
import collections
import json
from pathlib import Path
from typing import Any

import schemathesis

_COUNTS: dict[str, dict[str, Any]] = {}


@schemathesis.hook
def after_call(context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
    """Counts one answer."""
    one = _COUNTS.setdefault(
        case.operation.label,
        {name: collections.Counter() for name in ("phases", "statuses", "valid")} | {"seconds": 0.0, "longest": 0.0},
    )
    one["statuses"][response.status_code] += 1
    one["seconds"] += response.elapsed
    one["longest"] = max(one["longest"], response.elapsed)
    if case.meta is None:
        return
    one["phases"][case.meta.phase.name.value] += 1
    if case.meta.generation.mode.is_positive:
        one["valid"]["accepted" if response.status_code < 300 else _refused(response)] += 1


def _refused(response: schemathesis.Response) -> str:
    try:
        return f"{response.status_code} {response.json()['error']['param']}"
    except (ValueError, KeyError, TypeError):  # no error of ours, which a check of schemathesis tells
        return str(response.status_code)


atexit.register(lambda path: path.write_text(json.dumps(_COUNTS)), Path("counts.json").absolute())
