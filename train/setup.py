"""What a run needs before its first step: dtype, model, held-out text, state."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..checkpoints.errors import NoCheckpoint
from ..checkpoints.load import load_model
from ..checkpoints.manifest import Manifest
from ..checkpoints.store import CheckpointStore
from ..checkpoints.tokenizer import Tokenizer, check_vocabulary
from ..models.config import DecoderConfig
from ..models.dequantize import dequantized
from ..sharding import plans
from ..sharding.agreement import agree, count, from_first, problems
from ..sharding.plan import Plan, PlanError
from .data import load_tokenizer, open_dataset
from .display import Display
from .evaluate import make_evaluate
from .recipe import Recipe, RecipeError, recipe_to_dict
from .step import State, init_state, state_like


def open_plan(recipe: Recipe) -> Plan:
    """The plan that the recipe writes or names. A named one is fitted to what the recipe says of batch and model."""
    sizes = {"rows": recipe.batch_size // recipe.accumulation, "tokens": recipe.sequence_length}
    if recipe.model.init_from is None:
        model = recipe.model.decoder(recipe.model.vocab_size or 1, recipe.sequence_length).dimensions
        sizes |= model if recipe.model.vocab_size else {name: model[name] for name in model if name != "vocab"}
    try:
        return plans.resolve(recipe.plan, jax.device_count(), sizes)
    except PlanError as error:
        raise RecipeError(str(error)) from None


def check_plan(recipe: Recipe, plan: Plan, config: DecoderConfig | None = None) -> None:
    """Raises RecipeError unless `plan` can cut each micro-batch and, if it is known yet, the model."""
    rows = recipe.batch_size // recipe.accumulation
    sizes = {"rows": rows, "tokens": recipe.sequence_length, **(config.dimensions if config else {})}
    try:
        plan.check(sizes)
    except PlanError as error:
        hint = " (rows are those of a micro-batch, batch_size / accumulation; tokens are sequence_length.)"
        raise RecipeError(str(error) + hint) from None


def check_processes(recipe: Recipe, resume: str, plan: Plan) -> None:
    """Raises ProcessError unless all processes do the same, and RecipeError unless the plan takes all their devices."""
    if count() == 1:
        return
    settings = {**_flat(recipe_to_dict(recipe)), "resume": resume}
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    if problems("recipe", "" if from_first("recipe", lambda: digest) == digest else digest):
        for name, value in settings.items():
            agree(f"the setting {name}", json.dumps(value))
    if plan.devices != jax.device_count():
        raise RecipeError(
            f"With several processes a plan takes every device: plan={recipe.plan!r} takes {plan.devices}, and the "
            f"{count()} processes have {jax.device_count()}. Multiply an axis, such as fsdp or data, or start other "
            "processes."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def compute_dtype(name: str) -> Any:
    """The dtype of the products."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def open_model(
    recipe: Recipe, mesh: Mesh, before: Manifest | None
) -> tuple[DecoderConfig, dict[str, jax.Array] | None, Tokenizer]:
    """The model's config, its parameters if they come from elsewhere, and the tokenizer that fits it."""
    source = recipe.model.init_from
    tokenizer = None if source and recipe.data.tokenizer == "bytes" else load_tokenizer(recipe.data)
    params = None
    if source is None:
        assert tokenizer is not None
        config = recipe.model.decoder(tokenizer.vocab_size, recipe.sequence_length)
    elif before is not None and before.description.recipe["model"]["init_from"] == source:
        # The run has its own checkpoints, so what it began with need not be there any more.
        config = DecoderConfig.from_dict(before.description.model)
        tokenizer = tokenizer or Tokenizer.from_files(before.description.tokenizer_files)
    else:
        loaded = load_model(source, dtype=jnp.float32, mesh=mesh)
        # Quantised weights have no gradient: what they stand for is trained.
        config, params = dequantized(loaded.config, loaded.params, mesh=mesh)
        tokenizer = tokenizer or loaded.tokenizer or Tokenizer.bytes()
    check_vocabulary(tokenizer, config.vocab_size)
    if recipe.sequence_length > config.max_position_embeddings:
        raise RecipeError(
            f"sequence_length={recipe.sequence_length} is longer than the {config.max_position_embeddings} tokens that "
            f"the model of {source} takes; lower it."
        )
    return config, params, tokenizer


def open_evaluation(
    recipe: Recipe, config: DecoderConfig, tokenizer: Tokenizer, plan: Plan, mesh: Mesh, dtype: Any
):
    """The function from parameters to held-out loss, None when the recipe evaluates nothing."""
    if not recipe.eval.every or not recipe.data.eval_fraction:
        return None
    held_out = open_dataset(recipe.data, tokenizer, recipe.sequence_length, recipe.seed, "eval", progress=False)
    rows = recipe.batch_size // recipe.accumulation
    batches = recipe.eval.batches * recipe.accumulation
    return make_evaluate(config, held_out, rows, batches, mesh, dtype=dtype, plan=plan)


def open_state(
    store: CheckpointStore,
    config: DecoderConfig,
    params: dict[str, jax.Array] | None,
    seed: int,
    mesh: Mesh,
    show: Display,
) -> tuple[State, int]:
    """The state to start from, and the updates already in it."""
    try:
        restored = store.restore(state_like(config, mesh))
    except NoCheckpoint:
        return init_state(config, seed, mesh, params), 0
    for step, reason in restored.skipped:
        show.message(f"Step {step} is damaged and was passed over: {reason}")
    show.message(f"Resuming after step {restored.step}, from {store.path(restored.step)}.")
    return restored.state, restored.step
