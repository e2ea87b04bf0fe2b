"""The training loop, from a recipe to a folder of checkpoints, metrics and a picture.

The next step is sent off before the metrics of the last are read, so the devices never wait for Python. That is safe
for NaN too: a step that is not finite changes nothing, and neither does any step after it (see `step`).
"""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.errors import SaveError
from ..checkpoints.load import CHECKPOINTS
from ..checkpoints.manifest import Description, step_folders
from ..checkpoints.store import CheckpointStore
from ..sharding import processes
from ..sharding.agreement import agree, from_first, index, once
from . import schedules
from .data import batches, open_dataset, unigram_entropy
from .display import Display
from .meter import Meter, NotFiniteError
from .metrics import MetricsLog
from .place import part_here
from .recipe import Recipe, RecipeError
from .report import TrainResult, draw, headline, summary
from .resume import ResumeError, check_resume, describe, how_to_go_on, move_aside, newest
from .setup import check_plan, check_processes, compute_dtype, open_evaluation, open_model, open_plan, open_state
from .signals import StopSignals
from .step import State, make_step, put_batch, state_like
from .votes import Votes

__all__ = ["NotFiniteError", "ResumeError", "TrainResult", "train"]

METRICS, CURVE, TENSORBOARD = "metrics.jsonl", "loss.svg", "tensorboard"


def train(
    recipe: Recipe,
    *,
    resume: Literal["auto", "never", "must"] = "auto",
    display: bool = True,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Trains as the recipe says. In a job of several processes (see `sharding.processes`) all call it alike.

    Args:
        recipe: the run.
        resume: "auto" goes on from the output's newest good checkpoint if there is one; "must" fails without one;
            "never" starts afresh and moves an earlier run aside.
        display: show progress on the standard output.
        on_step: called with each step's metrics (`step`, `loss`, `lr`, ...), one step late.

    Raises:
        ValueError: settings, data, tokenizer or checkpoint that do not fit; each says what to do.
        NotFiniteError: NaN or infinite loss. Nothing is saved after it; earlier checkpoints stay.
        SaveError: the last checkpoint could not be saved. (An earlier one that fails is a warning.)
    """
    begin = time.perf_counter()
    if resume not in ("auto", "never", "must"):
        raise RecipeError(f"resume is one of auto, never, must; got {resume!r}.")
    plan = open_plan(recipe)
    check_plan(recipe, plan)
    check_processes(recipe, resume, plan)
    is_first = index() == 0
    display = display and is_first
    mesh, dtype = plan.mesh(), compute_dtype(recipe.dtype)
    schedule = schedules.make(recipe.schedule, recipe.optimizer.lr, recipe.steps)

    output = Path(recipe.output)
    directory = output / CHECKPOINTS
    if resume == "must" and not from_first("resume/must", lambda: "".join(map(str, step_folders(directory)))):
        raise ResumeError(f"There is no checkpoint in {directory} to resume from; use resume='auto'.")
    before = None if resume == "never" else newest(directory)
    config, params, tokenizer = open_model(recipe, mesh, before)
    check_plan(recipe, plan, config)
    opening = functools.partial(open_dataset, recipe.data, tokenizer, recipe.sequence_length, recipe.seed)
    dataset = once("data", functools.partial(opening, progress=display))
    agree("the text of data.path (its fingerprint)", dataset.fingerprint)
    entropy = float(from_first("entropy", lambda: repr(unigram_entropy(dataset))))
    evaluate = open_evaluation(recipe, config, tokenizer, plan, mesh, dtype)
    describe_at = functools.partial(describe, recipe, config, tokenizer, dataset, plan)
    if before is not None:
        check_resume(before, describe_at(0))
    state_like(config, mesh)  # an axis that the plan cannot cut is refused before anything is written

    with contextlib.ExitStack() as stack:
        show = stack.enter_context(Display(recipe.steps, enabled=display))
        signals = stack.enter_context(StopSignals())
        if resume == "never":
            leftovers = (CHECKPOINTS, METRICS, CURVE, TENSORBOARD)
            if aside := from_first("aside", lambda: str(move_aside(output, leftovers) or "")):
                show.message(f"The earlier run in {output} is now in {aside}.")
        processes.advise(functools.partial(how_to_go_on, directory))
        keep = recipe.checkpoint
        store = stack.enter_context(CheckpointStore(directory, keep_last=keep.keep_last, keep_every=keep.keep_every))
        state, start = open_state(store, config, params, recipe.seed, mesh, show)
        del params  # the first step takes their memory over
        board = output / TENSORBOARD if recipe.tensorboard else None
        written = output / METRICS if is_first else None
        log = stack.enter_context(MetricsLog(written, resume_step=start, tensorboard_dir=board))
        if log.notice:
            show.message(log.notice)
        show.message(headline(recipe, config, dataset, plan, dtype, entropy))

        meter = Meter(recipe, config, mesh, dtype, log, show, on_step)
        options = {"dtype": dtype, "remat": recipe.remat, "plan": plan}
        part = part_here(mesh, recipe.batch_size, recipe.accumulation)
        step = make_step(config, recipe.optimizer, schedule, mesh, **options)
        compile_seconds = 0.0
        if start >= recipe.steps:
            show.message(f"Nothing to do: {start} steps are made and the recipe asks for {recipe.steps}; raise steps.")
        else:
            show.message("Compiling the training step ...")
            first = put_batch(dataset.batch(start, recipe.batch_size, part), start, recipe.accumulation, mesh)
            compiling = time.perf_counter()
            step = step.lower(state, first).compile()
            compile_seconds = time.perf_counter() - compiling
            show.message(f"Compiled in {compile_seconds:.1f} s. {meter.peak_text}")

        feed = stack.enter_context(batches(dataset, start, recipe.batch_size, part))
        votes = Votes(mesh, signals)
        meter.restart()
        done, saved = start, start or None
        while done < recipe.steps and not votes.stop:
            batch = next(feed)
            state, metrics = step(state, put_batch(batch, done, recipe.accumulation, mesh))
            batch_hash = votes.cast(batch)
            meter.read()  # of the step before, while this one runs
            meter.sent(done, batch_hash, metrics)
            done += 1
            evaluating = evaluate is not None and is_due(done, recipe.eval.every, recipe.steps)
            saving = is_due(done, keep.every, recipe.steps)
            if evaluating or saving:
                meter.read()  # a state is used only once its step is known to be good
                if evaluating and evaluate is not None:
                    meter.evaluated(done, evaluate(state["params"]))
                if saving and done < recipe.steps:
                    warn_of_failed_save(store, show)
                    saved = save_or_warn(store, done, state, describe_at(done), show) or saved
                meter.restart()
        meter.read()
        if warn_of_failed_save(store, show) or saved != done:
            if votes.stop:
                show.message(f"{votes.asked}: saving step {done} before leaving.")
            store.save(done, state, describe_at(done), wait=True)

    result = TrainResult(
        step=done,
        loss=meter.loss,
        eval_loss=meter.eval_loss,
        unigram_entropy=entropy,
        interrupted=votes.stop if done < recipe.steps else None,
        tokens_per_second=meter.tokens_per_second,
        mfu=meter.mfu,
        compile_seconds=compile_seconds,
        seconds=time.perf_counter() - begin,
        output=output,
        checkpoint=store.path(done),
        metrics=output / METRICS,
        curve=output / CURVE,
    )
    if is_first:
        draw(result)
    show.message(summary(result))
    return result


def is_due(done: int, every: int, steps: int) -> bool:
    """Whether something that comes every so many steps (0: never but at the end), and at the end, comes now."""
    return done == steps or (every > 0 and done % every == 0)


def warn_of_failed_save(store: CheckpointStore, show: Display) -> bool:
    """Waits for the save in the background. Whether it failed: that is a warning, the run goes on and saves again."""
    try:
        store.wait()
    except SaveError as error:
        show.message(f"WARNING: {error}")
        return True
    return False


def save_or_warn(
    store: CheckpointStore, step: int, state: State, description: Description, show: Display
) -> int | None:
    """Starts saving in the background. The step, or None after a warning when that fails at once."""
    try:
        store.save(step, state, description)
    except SaveError as error:
        show.message(f"WARNING: {error}")
        return None
    return step
