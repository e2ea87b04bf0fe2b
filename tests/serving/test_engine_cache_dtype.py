"""The engine with keys and values kept in 8 bits: the numbers of a forward pass that rounds them so, and the room."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.serving.engines import against_forward, engine_of, loaded
from tests.serving.test_engine_latent import DENSE
from tests.serving.test_engine_machine import WINDOWS
from tests.serving.test_engine_states import MAMBA
from tests.thorough import thorough
from twinax.layers.contexts import PackedContext
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.engine_sizes import EngineSizes
from twinax.serving.http.config import ServeConfig
from twinax.serving.http.running import engine_settings

CASES = {
    "int8": (WINDOWS, "int8", ""),
    "float8": (WINDOWS, "float8", ""),
    "latent int8": (DENSE, "int8", ""),
    "latent float8": (DENSE, "float8", ""),
    "int8 on two devices": (dataclasses.replace(WINDOWS, vocab_size=260, num_kv_heads=2), "int8", "tensor=2"),
}


def to_int8(x: np.ndarray) -> np.ndarray:
    """What 8 bits and a scale for each vector keep of it, by numpy in float64."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


def to_float8(x: np.ndarray) -> np.ndarray:
    """The same. Below the least normal number it goes on in steps of that number."""
    scale = np.abs(x).max(-1, keepdims=True) / 448
    whole = x / np.where(scale > 0, scale, 1)
    normal = whole.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.where(np.abs(whole) < 2.0**-6, np.rint(whole * 64) / 64, normal) * scale


def rounded(kept: str, x: jax.Array) -> jax.Array:
    how = {"int8": to_int8, "float8": to_float8}[kept]
    return jax.pure_callback(
        lambda x: how(np.asarray(x, np.float64)).astype(np.float32), jax.ShapeDtypeStruct(x.shape, jnp.float32), x
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["segment_ids_BT", "positions_BT"],
    meta_fields=["attention", "kept"],
)
@dataclasses.dataclass(frozen=True)
class RoundedContext(PackedContext):
    """The context that trains, but for what it takes for keys and values."""

    kept: str = ""

    def attend(self, q, k, v, *rest, **more):
        return super().attend(q, rounded(self.kept, k), rounded(self.kept, v), *rest, **more)

    def attend_latent(self, q, latent_BTR, k_turned_BT1P, up, cache, layer, mixing):
        """A latent and the turned key have one scale; what is made of them is not rounded again."""
        both = rounded(self.kept, jnp.concatenate([latent_BTR, k_turned_BT1P[:, :, 0]], -1))
        size = latent_BTR.shape[-1]
        plain = PackedContext(self.segment_ids_BT, self.positions_BT, self.attention)
        return plain.attend_latent(q, both[..., :size], both[:, :, None, size:], up, cache, layer, mixing)


@pytest.fixture(scope="module", params=thorough(CASES, 2))
def served(request):
    config, kept, plan = CASES[request.param]
    return config, engine_of(config, cache_dtype=kept, plan=plan), kept


def test_numbers_are_those_of_a_forward_pass_that_rounds_keys_and_values(served):
    """A number that is nearly between two may be rounded to the other one, which may show a little in few places."""
    config, engine, kept = served
    off, _ = against_forward(config, engine, partial(RoundedContext, kept=kept))
    assert np.median(off) < 2e-6 and off.max() < 2e-3
    unlike, _ = against_forward(config, engine, PackedContext)
    assert 1e-4 < np.median(unlike) < 1e-2, "the cache was not rounded, or too much"


def test_room_for_more_tokens():
    sizes = {
        kept: EngineSizes.of(WINDOWS, EngineConfig(cache_bytes=1 << 20, max_running=999, cache_dtype=kept)).num_pages
        for kept in (None, "int8", "float8")
    }
    # 16 numbers and a scale of four bytes, where there were 16 of four.
    assert sizes["int8"] == sizes["float8"] == pytest.approx(sizes[None] * 64 / 20, abs=2)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cache_dtype must be int8 or float8, got 'fp4'; leave it out"):
        EngineConfig(cache_dtype="fp4")
    with pytest.raises(ValueError, match="The model keeps no keys and values; leave cache_dtype=int8 out"):
        Engine(loaded(MAMBA), EngineConfig(cache_dtype="int8", compile_cache=""))


def test_the_server_hands_it_to_the_engine():
    assert engine_settings(ServeConfig(model="m", cache_dtype="int8")).cache_dtype == "int8"
