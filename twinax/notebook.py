"""A model in a notebook: generate with it, look at its logits, train it a little.

model = twinax.load("runs/demo")
model.generate("def main(", max_tokens=40, temperature=0.7, seed=1)
model.logits("import os")           # [T, V]
model.train("docs/", steps=10)      # the losses; the model is now the trained one
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoints.load import LoadedModel, load_model
from .checkpoints.tokenizer import Tokenizer
from .layers.contexts import PackedContext
from .models.config import DecoderConfig
from .models.decoder import functional
from .serving.engine import Engine, EngineConfig, failure
from .serving.request import Request, SamplingParams
from .train.data.config import DataConfig
from .train.loop import train
from .train.recipe import ModelConfig, OptimizerConfig, Recipe

_SHORTEST = 16  # logits are computed for lengths padded to a power of two, so that few lengths compile


def load(path: str | os.PathLike[str], *, dtype: str | None = None) -> "Model":
    """Loads a run folder (its newest good step), a step folder or a Hugging Face folder.

    Files are mapped, not read: each parameter's pages are read as it goes to its device, and let go.

    `dtype`: "float32" or "bfloat16", of compute; None: float32 on a CPU, bfloat16 elsewhere. Raises ValueErrors that
    say what is wrong with the folder.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype is float32, bfloat16 or None; got {dtype!r}.")
    return Model(load_model(path), dtype=dtype)


class Model:
    """A model and its tokenizer.

    Attributes:
        config: sizes and choices of the decoder.
        params: the parameters by dotted name.
        tokenizer: text to ids and back; None where the folder had none.
    """

    def __init__(self, loaded: LoadedModel, *, dtype: str | None = None):
        self._loaded = loaded
        self.dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        self._engine: Engine | None = None
        self._ids = itertools.count()

    @property
    def config(self) -> DecoderConfig:
        return self._loaded.config

    @property
    def params(self) -> dict[str, jax.Array]:
        return self._loaded.params

    @property
    def tokenizer(self) -> Tokenizer:
        if self._loaded.tokenizer is None:
            raise ValueError(f"{self._loaded.source} has no tokenizer: give token ids, or add a tokenizer.json to it.")
        return self._loaded.tokenizer

    def __repr__(self) -> str:
        count = sum(array.size for array in self.params.values())
        return f"Model({self._loaded.family}, {count:,} parameters, from {str(self._loaded.source)!r})"

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt, as the server makes them (with BOS where the tokenizer begins texts with it)."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos)
        return [int(token) for token in prompt]

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages ({"role": ..., "content": ...}) as the text that the model's chat template makes of them."""
        return self.tokenizer.apply_chat_template(messages)

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> str:
        """The text that follows the prompt; options as `stream` has them."""
        return "".join(self.stream(prompt, **sampling))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yields the text that follows the prompt, piece by piece.

        `sampling`: the other fields of `SamplingParams` (top_k, top_p, min_p, stop, ...). Raises ValueError for a field
        that it does not have, or a value that breaks its rule, before anything is computed.
        """
        unknown = sorted(set(sampling) - set(SamplingParams.__struct_fields__))
        if unknown:
            fields = ", ".join(SamplingParams.__struct_fields__)
            raise ValueError(f"Sampling has no option {', '.join(unknown)}; it has {fields}.")
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **sampling)
        request = Request(f"notebook-{next(self._ids)}", self.encode(prompt), params)
        request.validate(self.config.vocab_size, self.config.max_position_embeddings)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        for output in self._warm_engine().stream([request]):
            if output.error:
                raise failure(output)
            if output.text:
                yield output.text

    def _warm_engine(self) -> Engine:
        if self._engine is None:
            chunk = min(256, self.config.max_position_embeddings)
            engine = Engine(self._loaded, EngineConfig(max_running=1, chunk_tokens=chunk, dtype=self.dtype))
            engine.warmup()
            self._engine = engine
        return self._engine

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Float32 logits [T, V]: row t is what the model expects after token t of the prompt."""
        ids = self.encode(prompt)
        if not 0 < len(ids) <= self.config.max_position_embeddings:
            raise ValueError(
                f"logits are computed for 1 to {self.config.max_position_embeddings} tokens (the model's context); "
                f"got {len(ids)}."
            )
        outside = [token for token in ids if not 0 <= token < self.config.vocab_size]
        if outside:
            raise ValueError(f"Token ids are below {self.config.vocab_size} in this model; got {outside[0]}.")
        length = max(_SHORTEST, 1 << (len(ids) - 1).bit_length())
        tokens, segments = np.zeros((2, 1, length), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        return np.asarray(_logits(self.config, self.dtype, self.params, tokens, segments))[0, : len(ids)]

    def _recipe(self, path: str) -> Recipe:
        """Plain settings for a few steps on a text."""
        return Recipe(
            data=DataConfig(path=path, eval_fraction=0.0),
            optimizer=OptimizerConfig(lr=3e-4),
            sequence_length=min(256, self.config.max_position_embeddings),
        )

    def train(
        self,
        what: Recipe | str | os.PathLike[str],
        *,
        steps: int = 10,
        learning_rate: float | None = None,
        output: str | os.PathLike[str] | None = None,
        display: bool = False,
    ) -> list[float]:
        """Trains this model for a few steps and returns the loss of each, in nats per token.

        Args:
            what: text to train on (a file, folder or pattern), or a recipe, whose `model` is replaced by this model.
            steps: optimizer steps.
            learning_rate: its peak; None: the recipe's, 3e-4 for a text.
            output: the run's folder; None: a new folder in the system's temporary one.
            display: show progress.

        From then on this object is the trained model, as the checkpoint in `output` holds it. Raises ValueErrors that
        say what is wrong with the text or the settings.
        """
        recipe: Any = what if isinstance(what, Recipe) else self._recipe(os.fspath(what))
        if learning_rate is not None:
            recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=learning_rate))
        recipe = replace(
            recipe,
            model=ModelConfig(init_from=str(self._loaded.source)),
            steps=steps,
            output=os.fspath(output or tempfile.mkdtemp(prefix="twinax-")),
        )
        losses: list[float] = []
        result = train(recipe, display=display, on_step=lambda metrics: losses.append(metrics["loss"]))
        self._loaded, self._engine = load_model(result.checkpoint), None
        return losses


@partial(jax.jit, static_argnums=(0, 1))
def _logits(config: DecoderConfig, dtype: str, params: dict[str, jax.Array], tokens_BT: Any, segments_BT: Any):
    """[B, T, V] float32."""
    model = functional(config, dtype=jnp.dtype(dtype))
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    hidden_BTD, *_ = model.hidden(params, tokens_BT, PackedContext(segments_BT, positions_BT))
    return model.unembed(params, hidden_BTD)
