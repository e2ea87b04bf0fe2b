"""The pool of pages that all candidates of `paged_attention` read and write (Kwon et al. 2023, arXiv:2309.06180).

Shapes: L layers, P pages, K key/value heads, S slots a page, D head size.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """Keys and values of all layers. A pytree, and the carry of the decoder's scan over layers.

    The layout is private to this folder: a page is contiguous, and its keys are transposed, so that both products of
    attention contract the last axis on the left with the last but one on the right. Of XLA:CPU's products that kind
    is quick for few rows and rounds a row the same whatever rows stand beside it.
    """

    k_LPKDS: jax.Array
    v_LPKSD: jax.Array

    @property
    def num_layers(self) -> int:
        return self.v_LPKSD.shape[0]

    @property
    def num_pages(self) -> int:
        return self.v_LPKSD.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.v_LPKSD.shape[2]

    @property
    def page_size(self) -> int:
        return self.v_LPKSD.shape[3]

    @property
    def head_dim(self) -> int:
        return self.v_LPKSD.shape[4]


def init_pages(
    num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype = jnp.float32
) -> Pages:
    """An empty pool of `num_pages` pages of `page_size` tokens for each layer, in `dtype`."""
    v_shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
    if min(v_shape) < 1:
        raise ValueError(f"layers, pages, heads, slots and head size must be positive, got {v_shape}")
    k_shape = (*v_shape[:3], head_dim, page_size)
    return Pages(jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype))
