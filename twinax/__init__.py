"""Twinax: the model that trains is the model that serves.

`import twinax` is quick: it imports neither JAX nor the rooms. What it names is imported when it is first used.
- `twinax.load(path)`: a checkpoint or a Hugging Face folder as a `Model` to generate with, look at and train.
- `twinax.Model`: what `load` returns.
- `twinax.Recipe`: the config of a training run, as recipe files define it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .notebook import Model, load
    from .train.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Model", "Recipe", "__version__", "load"]

_HOMES = {"load": "twinax.notebook", "Model": "twinax.notebook", "Recipe": "twinax.train.recipe"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twinax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
