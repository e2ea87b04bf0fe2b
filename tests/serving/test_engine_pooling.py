"""Vectors of prompts: those of the pass that trains and of transformers, whoever else runs and in what chunks."""

import json

import jax
import numpy as np
import pytest

from tests.serving.engines import TOKENIZER, engine_of, greedy, loaded, prompts, twin
from twinax.checkpoints.load import load_model
from twinax.layers.contexts import PackedContext
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import functional
from twinax.serving.engine import Engine, EngineConfig
from twinax.serving.request import InvalidRequest, Pooling, Request, SamplingParams

CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, max_position_embeddings=128, pattern=(LayerKind(), LayerKind(window=24)),
)  # fmt: skip
NOTHING_NEW = SamplingParams(temperature=0.0, max_tokens=1)


@pytest.fixture(scope="module")
def engine():
    """Compiled quickly: for values, not for bits."""
    engine = Engine(loaded(CONFIG), EngineConfig(max_running=6, page_size=16, chunk_tokens=64, compile_cache=""))
    engine.warmup()
    return engine


def pooled(engine: Engine, asked: list[list[int]], kind: Pooling, beside: tuple[Request, ...] = (), **more):
    """The vectors [N, D] of prompts that are asked for at once."""
    requests = [Request(f"p{n}", prompt, NOTHING_NEW, pooling=kind, **more) for n, prompt in enumerate(asked)]
    queue = [*beside, *requests]
    found = {}
    while queue or engine.has_work:
        while queue and len(engine.scheduler.waiting) < engine.config.max_waiting:
            engine.add(queue.pop(0))
        found |= {output.request_id: output for output in engine.step() if output.finish_reason}
    for request in requests:
        output = found[request.id]
        assert (output.token_ids, output.text, output.completion_tokens) == ([], "", 0)
        assert (output.finish_reason, output.prompt_tokens) == ("stop", len(request.prompt_ids))
    return np.stack([np.frombuffer(found[request.id].embedding, "<f4") for request in requests])


def test_they_are_those_of_the_model_that_trains(engine):
    model, params = functional(CONFIG), engine.loaded.params
    forward = jax.jit(lambda tokens, context: model.hidden(params, tokens, context)[0])
    asked = prompts(5)
    found = {kind: pooled(engine, asked, kind) for kind in ("last", "mean")}
    for nth, ids in enumerate(asked):
        tokens, place = np.zeros((1, 128), np.int32), np.arange(128, dtype=np.int32)[None]
        tokens[0, : len(ids)] = ids
        hidden_TD = np.asarray(forward(tokens, PackedContext((place < len(ids)).astype(np.int32), place)))[
            0, : len(ids)
        ]
        np.testing.assert_allclose(found["last"][nth], hidden_TD[-1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["mean"][nth], hidden_TD.mean(0), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_neighbours_chunks_preemption_and_the_cache_of_prompts_change_no_bit():
    engine = engine_of(CONFIG)
    crowded = twin(engine, chunk_tokens=17, num_pages=9, max_running=4, prefix_cache=None)
    asked = prompts(10)
    beside = tuple(Request(f"other-{n}", prompt, greedy(max_tokens=40)) for n, prompt in enumerate(prompts(16)[10:]))
    for kind in ("last", "mean"):
        alone = np.concatenate([pooled(engine, [prompt], kind) for prompt in asked])
        for one in (engine, crowded):
            np.testing.assert_array_equal(pooled(one, asked, kind, beside), alone)
            assert one.stats().pages_used == 0
    assert crowded.stats().compiles_after_warmup == 0
    assert engine.stats().cached_tokens > 0 and crowded.stats().preemptions > 0


@pytest.mark.slow
def test_they_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    engine = Engine(load_model(tmp_path), EngineConfig(page_size=16, chunk_tokens=48, compile_cache=""))
    engine.warmup()
    asked = [np.random.default_rng(n).integers(0, 256, size).tolist() for n, size in enumerate((1, 2, 30, 97, 200))]
    found = {kind: pooled(engine, asked, kind) for kind in ("last", "mean")}
    for nth, ids in enumerate(asked):
        with torch.no_grad():
            hidden_TD = theirs.model(torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(found["last"][nth], hidden_TD[-1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["mean"][nth], hidden_TD.mean(0), rtol=0, atol=1e-5)


def test_what_is_pooled_generates_nothing(engine):
    with pytest.raises(InvalidRequest, match="max_tokens must be 1 with pooling"):
        engine.add(Request("a", [1], SamplingParams(max_tokens=2), pooling="last"))
    with pytest.raises(InvalidRequest, match='pooling must be "last" or "mean"'):
        engine.add(Request("a", [1], NOTHING_NEW, pooling="max"))  # pyright: ignore[reportArgumentType]
