"""What an engine's config comes to for a model, and the runner of these sizes. No weights are needed to know them."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from ..models.cache import page_bytes
from ..models.config import DecoderConfig
from .compiles import use_compile_cache
from .engine_config import CACHE_DTYPES, EngineConfig
from .fit import keeps_prefixes, mesh_of
from .runner import Runner


def dtype_of(config: EngineConfig) -> jnp.dtype:
    """Of weights and compute."""
    return jnp.dtype(config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def cache_dtype_of(config: EngineConfig) -> jnp.dtype:
    """Of what is kept of each token."""
    return dtype_of(config) if config.cache_dtype is None else jnp.dtype(CACHE_DTYPES[config.cache_dtype])


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """`of` makes them.

    Attributes:
        max_model_len: tokens of prompt and output together, at most.
        pages_per_request, num_pages: of the cache. host_pages: of the host's memory.
    """

    max_model_len: int
    pages_per_request: int
    num_pages: int
    host_pages: int

    @classmethod
    def of(cls, model: DecoderConfig, config: EngineConfig) -> "EngineSizes":
        """Raises ValueError when the limits do not fit the model or each other."""
        longest = config.max_model_len or model.max_position_embeddings
        if not 2 <= longest <= model.max_position_embeddings:
            raise ValueError(
                f"max_model_len is from 2 to the model's context of {model.max_position_embeddings}; got {longest}."
            )
        one = page_bytes(model, config.page_size, cache_dtype_of(config))
        if config.cache_dtype is not None and not one:
            raise ValueError(f"The model keeps no keys and values; leave cache_dtype={config.cache_dtype} out.")
        pages = -(-longest // config.page_size)
        fitting = config.cache_bytes // one if one else config.max_running * pages
        if not config.num_pages and fitting < pages:
            raise ValueError(
                f"The cache must hold one request of max_model_len={longest} tokens, which takes {pages * one:,} "
                f"bytes; cache_bytes is {config.cache_bytes:,}. Raise it or shorten max_model_len."
            )
        num_pages = config.num_pages or min(config.max_running * pages, fitting)
        return cls(longest, pages, num_pages, config.host_cache_bytes // one if one and keeps_prefixes(model) else 0)


def check_memory(model: DecoderConfig, config: EngineConfig, sizes: EngineSizes) -> None:
    """Raises ValueError where the caches alone take more than this machine has: better than to be killed for it."""
    one = page_bytes(model, config.page_size, cache_dtype_of(config))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mesh = mesh_of(config.plan, model)
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    there = sum(limit or 0 for limit in limits) or host
    for name, pages, room, where in (
        ("num_pages", sizes.num_pages, there, "its devices have" if any(limits) else "this machine has"),
        ("host_cache_bytes", sizes.host_pages, host, "this machine has"),
    ):
        if pages * one > room:
            raise ValueError(
                f"A cache of {pages:,} pages of {config.page_size} tokens takes {pages * one:,} bytes, and {where} "
                f"{room:,}; lower {name}{' or cache_bytes' if name == 'num_pages' else ''}."
            )


def runner_of(model: DecoderConfig, config: EngineConfig) -> Runner:
    """What runs the steps of such an engine, without weights so far."""
    sizes = EngineSizes.of(model, config)
    check_memory(model, config, sizes)
    return Runner(
        model,
        slots=config.max_running,
        num_pages=sizes.num_pages,
        page_size=config.page_size,
        pages_per_request=sizes.pages_per_request,
        chunk_tokens=config.chunk_tokens,
        dtype=dtype_of(config),
        cache_dtype=cache_dtype_of(config),
        mesh=mesh_of(config.plan, model),
        host_cache=sizes.host_pages > 0,
        kept=use_compile_cache(config.compile_cache),
    )
