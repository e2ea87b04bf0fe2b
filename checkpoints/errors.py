"""What can be wrong with a checkpoint: `ValueError`s whose text states the rule, what was seen and what to do."""

from __future__ import annotations

_LONGEST = 500  # characters of a line: names may be a stranger's


class CheckpointError(ValueError):
    """Something about a checkpoint that the user can act on."""


class DamagedCheckpoint(CheckpointError):
    """The bytes on disk are not those that were written: truncated, changed, missing, or not of this format."""


class NoCheckpoint(CheckpointError):
    """There is nothing to restore or load at the place that was named."""


class MismatchedCheckpoint(CheckpointError):
    """The checkpoint is sound, but of another model, or of another training set-up."""


class SaveError(CheckpointError):
    """A save did not complete. Everything that was committed before it is untouched."""


def first_few(lines: list[str], limit: int = 8) -> str:
    """The first `limit` of `lines`, each on a line of its own and not too long, and how many were left out."""
    shown = [f"  {line[:_LONGEST]}{'...' if len(line) > _LONGEST else ''}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
