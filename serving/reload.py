"""Other weights for an engine that runs: loaded beside its steps, exchanged between two of them, nothing compiled."""

from functools import partial
from pathlib import Path

from ..checkpoints.load import LoadedModel, load_model
from ..models.parameters import weight_dtype
from .engine import Engine
from .fit import mesh_of
from .weight_order import in_order


def load_like(engine: Engine, path: str | Path) -> LoadedModel:
    """A checkpoint of the model that the engine serves, on its devices beside the weights in use.

    Raises ValueError (all that `load_model` raises, and) when config, tokenizer, names or shapes differ.
    """
    mesh, dtype = partial(mesh_of, engine.config.plan), partial(weight_dtype, dtype=engine.runner.dtype)
    loaded, now = in_order(load_model(path, dtype=dtype, mesh=mesh)), engine.loaded
    if loaded.config != now.config:
        old, new = now.config.to_dict(), loaded.config.to_dict()
        differing = [f"{name} {new.get(name)!r} for {old.get(name)!r}" for name in old if new.get(name) != old[name]]
        raise ValueError(
            f"New weights must be of the same model, {loaded.source} has {', '.join(differing)}; "
            "start another server for it."
        )
    if loaded.tokenizer is None or loaded.tokenizer.fingerprint != engine.tokenizer.fingerprint:
        raise ValueError(
            f"New weights must come with the same tokenizer, that of {loaded.source} differs from {now.source}'s; "
            "start another server for it."
        )
    shapes = ({name: array.shape for name, array in model.params.items()} for model in (loaded, now))
    if (new := next(shapes)) != (old := next(shapes)):
        name = min(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
        raise ValueError(
            f"New weights must have the same names and shapes, {name} is {new.get(name)} in {loaded.source} and "
            f"{old.get(name)} in {now.source}; start another server for it."
        )
    return loaded


def exchange(engine: Engine, loaded: LoadedModel) -> None:
    """Serve `loaded` (of `load_like`) from now on. The engine must have no work; its prefix cache is emptied."""
    if engine.has_work:
        raise ValueError("Weights are exchanged when no request is in flight; let those that are finish first.")
    engine.runner.use_params(loaded.params)
    engine.loaded = loaded
    cache = engine.scheduler.cache
    if cache is not None:
        cache.clear()
