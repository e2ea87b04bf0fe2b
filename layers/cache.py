"""What a decoder keeps of the requests that it serves: the carry of its blocks, updated in place."""

import dataclasses
from functools import partial
from typing import Any

import jax

from ..pallas_kernels.paged_attention import Pages, init_pages


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "states"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Attributes:
        pages: what is kept of each token, by the layers that keep something; None: none does.
        states: what is kept of each request, by name: [layers that do, slots, ...], float32 or wider.
    """

    pages: Pages | None
    states: dict[str, jax.Array]

    def with_pages(self, pages: Pages) -> "Cache":
        return dataclasses.replace(self, pages=pages)

    def with_state(self, name: str, state: Any) -> "Cache":
        return dataclasses.replace(self, states={**self.states, name: state})

__all__ = ["Cache", "init_pages"]
