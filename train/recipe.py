"""Recipes: a training run as one frozen value.

A recipe file is Python that defines `recipe = Recipe(...)`; flags of the command line override fields by their dotted
names. Every setting is checked when the value is made. No JAX here: recipes are read where nothing is computed.
"""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

from ..layers.moe_config import MoEConfig
from ..layers.rope_config import RopeConfig
from ..models.config import DecoderConfig
from . import fields
from .data.config import DataConfig
from .schedules import ScheduleConfig

DTYPES = ("auto", "float32", "bfloat16")
# Settings of `model` that only a mixture of experts has.
MIXTURE = (
    "experts_per_token", "expert_size", "shared_experts", "router", "balance_loss", "z_loss", "bias_update"
)  # fmt: skip
REMAT = ("none", "dots", "full", "offload")


class RecipeError(ValueError):
    """A recipe that cannot be read or does not hold together; the text says what to change."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, or where to take a trained one from.

    Attributes:
        init_from: a Twinax checkpoint, a run's folder or a Hugging Face folder, whose sizes and parameters the run
            begins with; the other fields of `model` are then left alone.
        family: model family, a file of models/families.
        vocab_size: rows of the embedding; by default the tokenizer's.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of the feed-forward.
        num_layers: transformer blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; must divide num_heads.
        head_dim: size of a head; by default hidden_size / num_heads.
        rope_theta: base of the rotary embedding's wavelengths.
        norm_eps: epsilon of RMSNorm.
        tie_embeddings: use the embedding as output projection.
        attention_bias: biases on the attention's projections.
        mlp_bias: biases on the feed-forward's projections.
        max_position_embeddings: longest context the model is said to take; by default sequence_length.
        experts: experts of each feed-forward, of which a token takes a few; 0 for a dense model.
        experts_per_token: how many a token takes.
        expert_size: hidden width of one expert; by default intermediate_size.
        shared_experts: experts that every token takes besides.
        router: how a token's experts are scored: "softmax" or "sigmoid".
        balance_loss: coefficient of the load-balancing loss.
        z_loss: coefficient of the router's z-loss.
        bias_update: how far a step moves the bias of an expert that got too few or too many tokens (sigmoid only).
    """

    init_from: str | None = None
    family: str = "llama"
    vocab_size: int | None = None
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int | None = None
    experts: int = 0
    experts_per_token: int = 2
    expert_size: int | None = None
    shared_experts: int = 0
    router: str = "softmax"
    balance_loss: float = 0.01
    z_loss: float = 0.001
    bias_update: float = 0.0

    def __post_init__(self) -> None:
        fields.check_types(self, "model.")
        idle = [f.name for f in dataclasses.fields(self) if f.name in MIXTURE and getattr(self, f.name) != f.default]
        if idle and not self.experts:
            raise RecipeError(
                f"model.{idle[0]}={getattr(self, idle[0])!r} is for a mixture of experts, and model.experts is 0; set "
                f"model.experts, or leave out {', '.join('model.' + name for name in idle)}."
            )
        if self.init_from is not None:
            changed = [f.name for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
            if changed:
                raise RecipeError(
                    f"model.init_from={self.init_from!r} brings its own sizes, so model.{changed[0]} has no say; "
                    f"leave out {', '.join('model.' + name for name in changed)}, or init_from."
                )
        elif self.head_dim is None and self.hidden_size % self.num_heads:
            raise RecipeError(
                f"model.hidden_size={self.hidden_size} does not divide into model.num_heads={self.num_heads}; "
                "change one of them, or set model.head_dim."
            )
        else:
            self.decoder(vocab_size=1, sequence_length=1)  # DecoderConfig has the other rules

    def decoder(self, vocab_size: int, sequence_length: int) -> DecoderConfig:
        """The decoder of these sizes.

        Args:
            vocab_size: of the tokenizer, used unless the recipe says otherwise.
            sequence_length: of the run, likewise.
        """
        return DecoderConfig(
            family=self.family,
            vocab_size=self.vocab_size or vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            rope=RopeConfig(theta=self.rope_theta),
            norm_eps=self.norm_eps,
            tie_embeddings=self.tie_embeddings,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            max_position_embeddings=self.max_position_embeddings or sequence_length,
            moe=self._mixture() if self.experts else None,
        )

    def _mixture(self) -> MoEConfig:
        same = {name: getattr(self, name) for name in MIXTURE if name != "expert_size"}
        return MoEConfig(num_experts=self.experts, expert_size=self.expert_size or self.intermediate_size, **same)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate; the schedule moves it.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: share of a matrix that a step takes away, times the learning rate; norms and biases keep theirs.
        clip_norm: longest gradient (global norm); longer ones are scaled down to it; 0 turns clipping off.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        fields.check_types(self, "optimizer.")
        rules = {
            "lr": (self.lr > 0, "a positive number"),
            "beta1": (0 <= self.beta1 < 1, "from 0 to below 1"),
            "beta2": (0 <= self.beta2 < 1, "from 0 to below 1"),
            "eps": (self.eps > 0, "a positive number"),
            "weight_decay": (self.weight_decay >= 0, "from 0 up"),
            "clip_norm": (self.clip_norm >= 0, "from 0 up, 0 for no clipping"),
        }
        fields.check_rules(self, "optimizer.", rules)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and which checkpoints stay.

    Attributes:
        every: steps between checkpoints; 0 saves at the end only. The last step is always saved.
        keep_last: how many of the newest checkpoints stay.
        keep_every: checkpoints of steps that this divides stay for good; by default none does.
    """

    every: int = 100
    keep_last: int = 3
    keep_every: int | None = None

    def __post_init__(self) -> None:
        fields.check_types(self, "checkpoint.")
        rules = {
            "every": (self.every >= 0, "a number of steps from 0 up"),
            "keep_last": (self.keep_last >= 1, "from 1 up"),
            "keep_every": (self.keep_every is None or self.keep_every >= 1, "a number of steps from 1 up, or None"),
        }
        fields.check_rules(self, "checkpoint.", rules)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out text (what `data.eval_fraction` holds out; nothing is evaluated when that is 0).

    Attributes:
        every: steps between evaluations, which also come at the end; 0 turns them off.
        batches: at most so many batches of the held-out text, always the same ones; 0 takes all.
    """

    every: int = 100
    batches: int = 16

    def __post_init__(self) -> None:
        fields.check_types(self, "eval.")
        rule = "a number from 0 up"
        fields.check_rules(self, "eval.", {"every": (self.every >= 0, rule), "batches": (self.batches >= 0, rule)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        model: sizes of the model.
        data: text to train on.
        optimizer: AdamW.
        schedule: how the learning rate moves.
        checkpoint: when to save, and which checkpoints stay.
        eval: loss on held-out text.
        steps: optimizer steps in all, those before a resume included.
        batch_size: rows of a step, over all devices and micro-batches.
        sequence_length: tokens of a row.
        accumulation: micro-batches that a step's rows are cut into; more take less memory, and give the same step.
        dtype: "float32" or "bfloat16" products (parameters are float32); "auto" takes float32 on a CPU, else bfloat16.
        remat: what the backward pass computes again to save memory: "none", "dots" (all but products), "full", or
            "offload" (full, and what enters each block waits in the host's memory; a CPU has but one memory).
        plan: devices per mesh axis, such as "fsdp=4,tensor=2", or a preset's name, such as "fully_sharded"; empty for
            one device. README lists the axes.
        seed: of the initial parameters and the order of the data.
        tensorboard: also write TensorBoard events (needs tensorboardX).
        output: the run's folder: checkpoints, metrics.jsonl, loss.svg.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    accumulation: int = 1
    dtype: str = "auto"
    remat: str = "none"
    plan: str = ""
    seed: int = 0
    tensorboard: bool = False
    output: str = "runs/default"

    def __post_init__(self) -> None:
        fields.check_types(self)
        rules = {
            "steps": (self.steps >= 1, "a whole number from 1 up"),
            "batch_size": (self.batch_size >= 1, "a whole number from 1 up"),
            "sequence_length": (self.sequence_length >= 2, "a whole number from 2 up"),
            "accumulation": (self.accumulation >= 1, "a whole number from 1 up"),
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "remat": (self.remat in REMAT, f"one of {', '.join(REMAT)}"),
            "seed": (0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1"),
            "output": (bool(self.output), "the path of a folder"),
        }
        fields.check_rules(self, "", rules)
        if self.batch_size % self.accumulation:
            raise RecipeError(
                f"batch_size={self.batch_size} rows cannot be cut into accumulation={self.accumulation} equal "
                "micro-batches; make it a multiple."
            )
        longest = self.model.max_position_embeddings
        if longest is not None and self.sequence_length > longest:
            raise RecipeError(
                f"sequence_length={self.sequence_length} is longer than model.max_position_embeddings={longest}."
            )


def load_recipe(path: str | Path) -> Recipe:
    """The recipe of a file, or of `recipes/NAME.py` for a bare name.

    Raises RecipeError for a missing file (naming the nearest there is), a file that fails, or one without a recipe.
    """
    path = Path(path)
    if path.suffix != ".py" and not path.exists():
        named = Path("recipes") / f"{path}.py"
        path = named if named.exists() else path
    if not path.is_file():
        there = sorted({*path.parent.glob("*.py"), *Path("recipes").glob("*.py"), *Path().glob("*.py")})
        # By name first, or a wrong folder would hide the right file.
        by_name = {key: str(file) for file in reversed(there) for key in (file.name, file.stem)}
        near = fields.closest(path.name, by_name) or fields.closest(str(path), map(str, there))
        hint = f"; the nearest is {by_name.get(near, near)!r}" if near else "; a recipe is a Python file"
        raise RecipeError(f"There is no recipe {str(path)!r}{hint}.")
    try:
        recipe = runpy.run_path(str(path)).get("recipe")
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    except Exception as error:
        raise RecipeError(f"{path} cannot be run as Python: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path} must define `recipe = Recipe(...)`; there `recipe` is {type(recipe).__name__}.")
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values for JSON."""
    return fields.to_dict(recipe)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Reads back `recipe_to_dict`; RecipeError names an unknown setting and the nearest right one."""
    try:
        return fields.from_dict(Recipe, values)
    except ValueError as error:
        raise RecipeError(str(error)) from error
