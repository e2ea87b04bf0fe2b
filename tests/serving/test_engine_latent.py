"""The engine with latent attention, layers that differ, and quantised weights: the same bits in any company."""

import dataclasses

import jax.numpy as jnp
import pytest

from tests.serving.engines import TOKENIZER, check_against_training, engine_of, greedy, loaded, logprobs_of, prompts
from tests.thorough import thorough
from twinax.layers.mixer_config import LatentAttentionConfig
from twinax.layers.moe_config import MoEConfig
from twinax.layers.quantization_config import Quantization
from twinax.layers.rope_config import RopeConfig
from twinax.models.cache import init_cache, page_bytes
from twinax.models.config import DecoderConfig, LayerKind
from twinax.serving.engine import Engine, EngineConfig
from twinax.sharding.plan import PlanError

COMMON = {
    "vocab_size": TOKENIZER.vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
MOE = MoEConfig(num_experts=6, experts_per_token=2, expert_size=32, balance_loss=0, z_loss=0)
LATENT = DecoderConfig(
    **COMMON,
    num_kv_heads=4,
    head_dim=24,
    rope=RopeConfig(size=8),
    latent=LatentAttentionConfig(query_rank=32, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=12),
    moe=MOE,
    pattern=(
        LayerKind(mixer="latent_attention", feed_forward="mlp"),
        LayerKind(mixer="latent_attention"),
        LayerKind(mixer="latent_attention"),
    ),
)
FLOAT8 = DecoderConfig.from_dict(
    {**LATENT.to_dict(), "quantization": {"format": "fp8_e4m3", "block": [16, 32], "parts": ["experts", "linear"]}}
)
MXFP4 = DecoderConfig(
    **COMMON,
    num_kv_heads=2,
    head_dim=16,
    sinks=True,
    pattern=(LayerKind(window=16), LayerKind(), LayerKind(window=16)),
    moe=MoEConfig(
        num_experts=6, experts_per_token=2, expert_size=32, bias=True, router_bias=True, clamp=1.0, gate_slope=1.7,
        up_offset=1.0, balance_loss=0, z_loss=0,
    ),
    quantization=Quantization("mxfp4", (1, 32), ("experts",)),
)  # fmt: skip
# Of a mixture only the prompt's numbers have the same bits in any company (see test_engine_moe).
DENSE = dataclasses.replace(LATENT, moe=None)
MODELS = {
    "latent": DENSE,
    "float8": dataclasses.replace(DENSE, quantization=FLOAT8.quantization),
    "mixture in float8": FLOAT8,
    "mixture in mxfp4": MXFP4,
}


@pytest.fixture(scope="module", params=thorough(MODELS))
def served(request):
    return MODELS[request.param], engine_of(MODELS[request.param])


def test_tokens_and_logprobs_are_those_of_the_training_forward(served):
    check_against_training(*served)


def test_a_request_gives_the_same_bits_alone_and_among_neighbours(served):
    config, engine = served
    asked = prompts(9)
    among = engine.generate(asked, greedy(prompt_logprobs=0))
    for prompt, one in zip(asked, among, strict=True):
        (alone,) = engine.generate([prompt], greedy(prompt_logprobs=0))
        assert alone.token_ids == one.token_ids
        same = len(prompt) - 1 if config.moe else None
        assert logprobs_of(alone)[:same] == logprobs_of(one)[:same]
        assert logprobs_of(alone) == pytest.approx(logprobs_of(one), rel=1e-6)


def test_the_cache_keeps_a_latent_and_not_heads():
    cache = init_cache(LATENT, num_pages=3, page_size=16, slots=5, dtype=jnp.dtype(jnp.bfloat16))
    assert cache.pages is not None and cache.pages.latent and cache.pages.head_dim == 32 + 8
    heads = DecoderConfig.from_dict({**MXFP4.to_dict(), "num_kv_heads": 4, "head_dim": 24})
    assert page_bytes(LATENT, 16, jnp.dtype(jnp.float32)) < page_bytes(heads, 16, jnp.dtype(jnp.float32)) / 2


def test_quantised_weights_on_a_mesh_are_refused():
    dense = dataclasses.replace(MODELS["float8"], vocab_size=260)
    with pytest.raises(PlanError, match="fp8_e4m3 weights are served by one device so far"):
        Engine(loaded(dense), EngineConfig(plan="tensor=2", compile_cache=""))
    with pytest.raises(PlanError, match="Layers of latent_attention are served by one device so far"):
        Engine(loaded(dataclasses.replace(dense, quantization=None)), EngineConfig(plan="tensor=2", compile_cache=""))
