"""Model families: one file each, whose name is the `model_type` of its Hugging Face config.json.

A family is a module with

- `from_hf(config) -> DecoderConfig`: strict: a key it does not understand, and that could change a number, is refused
  (`_reader`);
- `to_hf(config) -> dict`: the config.json that gives the same model back;
- `tensor_table(config) -> tuple[TensorEntry, ...]`: which Hugging Face tensor is which parameter, read both ways (from
  names of modules: `_table`);
- `ignorable_tensors(config) -> tuple[str, ...]`: patterns of tensors that change nothing;
- if these hold numbers that others could be, `contradiction(config, name, tensor) -> str | None`: why one of them is
  not what the config makes it.
"""

import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any, Protocol, cast

from ..config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Tensor `hf_name` of a Hugging Face folder is `params[name][index]`, or holds it among others.

    Attributes:
        index: of a parameter that is stacked, which one: (layer,) or (layer, expert).
        groups: the tensor's last two dimensions, the last of so many numbers, are one here; None: they are as they are.
        transposed: the tensor's last two dimensions are exchanged then.
        rows: (start, stop, step) of dimension `axis` then, of a tensor that holds several parameters; None: all.
    """

    hf_name: str
    name: str
    index: tuple[int, ...] = ()
    rows: tuple[int, int, int] | None = None
    transposed: bool = False
    axis: int = 0
    groups: int | None = None


class Family(Protocol):
    """What a file of this folder offers."""

    def from_hf(self, config: dict[str, Any]) -> DecoderConfig: ...
    def to_hf(self, config: DecoderConfig) -> dict[str, Any]: ...
    def tensor_table(self, config: DecoderConfig) -> tuple[TensorEntry, ...]: ...
    def ignorable_tensors(self, config: DecoderConfig) -> tuple[str, ...]: ...


def names() -> tuple[str, ...]:
    """The families there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Family:
    """The family called `name`; ValueError lists the choices."""
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), 1)
        hint = f" The nearest is {near[0]!r}." if near else ""
        raise ValueError(f"There is no model family {name!r}; Twinax has {', '.join(names())}.{hint}")
    return cast(Family, importlib.import_module(f".{name}", __name__))
