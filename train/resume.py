"""What a checkpoint of a run says of itself, and whether a recipe may go on from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoints import manifest
from ..checkpoints.errors import DamagedCheckpoint
from ..checkpoints.manifest import Description, Manifest
from ..checkpoints.tokenizer import Tokenizer
from ..models.config import DecoderConfig
from ..sharding.agreement import from_first, index
from ..sharding.plan import Plan
from .data.dataset import Dataset
from .recipe import Recipe, recipe_to_dict


class ResumeError(ValueError):
    """The output folder holds a run that this recipe cannot go on with; the text names every difference."""


def describe(
    recipe: Recipe, config: DecoderConfig, tokenizer: Tokenizer, dataset: Dataset, plan: Plan, step: int
) -> Description:
    """The description of the checkpoint after `step` updates."""
    data = {
        **dataset.describe(),
        "path": list(recipe.data.paths),
        "eval_fraction": recipe.data.eval_fraction,
        "tokenizer": tokenizer.fingerprint,
        "batch_size": recipe.batch_size,
        "next_step": step,
        "next_row": step * recipe.batch_size,
    }
    return Description(
        family=config.family,
        model=config.to_dict(),
        tokenizer_files=tokenizer.files(),
        data=data,
        recipe=recipe_to_dict(recipe),
        plan=plan.to_dict(),
        seed=recipe.seed,
    )


def newest(directory: Path) -> Manifest | None:
    """The manifest of the newest checkpoint in `directory` that has a readable one, as process 0 sees it."""
    found = _newest(directory) if index() == 0 else None
    name = from_first("resume/newest", lambda: "" if found is None else found.folder.name)
    if index() == 0 or not name:
        return found
    if not (directory / name).is_dir():
        raise ResumeError(
            f"Process 0 goes on from {directory / name}, which process {index()} does not see. Choose an output folder "
            "on a disk that all machines share, at the same path."
        )
    return manifest.read(directory / name)


def _newest(directory: Path) -> Manifest | None:
    for folder in reversed(manifest.step_folders(directory).values()):
        try:
            return manifest.read(folder)
        except DamagedCheckpoint:
            continue  # the store says so when it restores, and takes the one before
    return None


def how_to_go_on(directory: Path) -> str:
    """What to do when a job of several processes has ended early."""
    step = max(manifest.step_folders(directory), default=0)
    where = f"the run goes on after step {step}, the newest that is saved" if step else "nothing is saved yet"
    return f"Start all processes again with the same command: {where}."


def check_resume(before: Manifest, now: Description) -> None:
    """Raises ResumeError when the checkpoint is of another model or order of data than the run `now`.

    Anything else of a recipe may change from one process to the next: learning rate, steps, plan, micro-batches.
    """
    then, model = before.description, json.loads(json.dumps(now.model))  # in a checkpoint, tuples are lists
    different = [*_differences(then.model, model, "model."), *_data_differences(then.data, now.data)]
    if different:
        raise ResumeError(
            f"{before.folder} cannot go on with this recipe:\n"
            + "\n".join(f"  {line}" for line in different)
            + "\nSet these as they were, choose another output folder, or start afresh with resume='never' "
            "(the old run is then moved aside)."
        )


def _differences(then: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{name}{key}.")
    elif then != now:
        yield f"{name.rstrip('.')} is {then!r} in the checkpoint and {now!r} here"


def _data_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if (then["fingerprint"], then["batch_size"]) == (now["fingerprint"], now["batch_size"]):
        return []
    found = []
    for key, name in (
        ("seed", "seed"),
        ("batch_size", "batch_size"),
        ("sequence_length", "sequence_length"),
        ("eval_fraction", "data.eval_fraction"),
        ("tokenizer", "data.tokenizer (its fingerprint)"),
    ):
        found += _differences(then[key], now[key], name)
    if not found:
        # Nothing that was set differs, so the text itself does.
        found = list(_differences(then["path"], now["path"], "data.path"))
        size = f"{then['tokens']:,} training tokens in the checkpoint and {now['tokens']:,} here"
        found.append(f"the text of data.path is not the same: {size}")
    return found


def move_aside(output: Path, names: tuple[str, ...]) -> Path | None:
    """Moves what an earlier run left in `output` into a new folder `before-N` there; None when there is nothing."""
    there = [output / name for name in names if (output / name).exists()]
    if not there:
        return None
    number = next(n for n in range(1, 10**6) if not (output / f"before-{n}").exists())
    aside = output / f"before-{number}"
    aside.mkdir(parents=True)
    for path in there:
        path.rename(aside / path.name)
    return aside
