"""The cache of a model, as its layers' mixers declare what they keep."""

import jax
import jax.numpy as jnp

from ..layers.cache import Cache, init_pages
from .config import RECURRENT, DecoderConfig


def init_cache(config: DecoderConfig, *, num_pages: int, page_size: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache.

    Args:
        num_pages, page_size: of what is kept of each token: pages, and tokens of one. dtype: of these.
        slots: requests that may have a state at once. States are float32, or wider where `dtype` is.
    """
    pages = None
    if layers := len(config.layers_with("attention")):
        pages = init_pages(layers, num_pages, page_size, config.num_kv_heads, config.head_dim, dtype)
    elif layers := len(config.layers_with("latent_attention")):
        assert config.latent is not None
        kept, rank = config.latent.kv_rank + config.latent.rope_dim, config.latent.kv_rank
        pages = init_pages(layers, num_pages, page_size, 1, kept, dtype, latent=rank)
    wide = dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32
    states = {
        f"{mixer}.{name}": jnp.zeros((len(config.layers_with(mixer)), slots, *shape), wide)
        for mixer in config.mixers
        if mixer in RECURRENT
        for name, shape in getattr(config, RECURRENT[mixer]).states.items()
    }
    return Cache(pages, states)


def page_bytes(config: DecoderConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page of all layers, as the platform's layout has it."""
    made = jax.eval_shape(lambda: init_cache(config, num_pages=1, page_size=page_size, slots=1, dtype=dtype).pages)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
