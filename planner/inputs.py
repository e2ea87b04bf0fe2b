"""From what the command line names to a model: a recipe, a Hugging Face config.json, or our own."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..models import families
from ..models.config import DecoderConfig
from ..train.recipe import Recipe, load_recipe
from .errors import PlannerError

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and the recipe that it is from, if it is."""

    model: DecoderConfig
    recipe: Recipe | None = None


def read_source(path: str, seq_len: int | None) -> Source:
    """The model of a recipe (a file or a name in recipes/), of a config.json, or of a folder that holds one.

    Raises PlannerError, or RecipeError for a recipe that cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / CONFIG
        if not file.is_file():
            raise PlannerError(f"The folder {path} holds no {CONFIG}; name a recipe or a {CONFIG}.")
    if file.suffix == ".json":
        return Source(read_config(file))
    recipe = load_recipe(path)
    return Source(_recipe_model(recipe, seq_len), recipe)


def read_config(file: Path) -> DecoderConfig:
    """The model of a Hugging Face config.json (it says its model_type) or of `DecoderConfig.to_dict`."""
    if not file.is_file():
        raise PlannerError(f"There is no file {file}; name a recipe or a {CONFIG}.")
    try:
        values: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise PlannerError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise PlannerError(f"{file} holds no settings of a model, but {type(values).__name__}.")
    try:
        if "model_type" in values or "architectures" in values:
            return families.load(str(values.get("model_type", "llama"))).from_hf(values)
        return DecoderConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise PlannerError(f"{file}: {error}") from error


def _recipe_model(recipe: Recipe, seq_len: int | None) -> DecoderConfig:
    if recipe.model.init_from is not None:
        return read_source(recipe.model.init_from, None).model
    vocab_size = recipe.model.vocab_size
    if vocab_size is None:
        from ..train.data.config import load_tokenizer

        try:
            vocab_size = load_tokenizer(recipe.data).vocab_size
        except (ValueError, OSError) as error:
            raise PlannerError(
                f"The recipe takes the vocabulary's size from its tokenizer, which cannot be read: {error}. Set "
                "model.vocab_size in the recipe."
            ) from error
    return recipe.model.decoder(vocab_size, max(recipe.sequence_length, seq_len or 0))


def summary(model: DecoderConfig) -> str:
    """A model in a few words."""
    from .sizes import multiplied, parameters

    total = sum(math.prod(p.shape) for p in parameters(model))
    text = f"{total / 1e9:.2f}B parameters" if total >= 1e8 else f"{total / 1e6:.1f}M parameters"
    if model.moe is not None:
        active = multiplied(model, True) + multiplied(model, False)
        text += f" ({active / 1e9:.2f}B for a token), {model.moe.num_experts} experts"
    return f"{model.family} of {text}, {model.num_layers} layers"
