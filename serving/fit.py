"""What an engine can do with a model: the devices that may share it, and whether its prompts can be kept."""

from jax.sharding import Mesh

from ..models.config import DecoderConfig
from ..sharding.plan import Plan, PlanError


def mesh_of(text: str, model: DecoderConfig) -> Mesh | None:
    """The devices of a plan, None for one device. Raises PlanError when it does not fit the model or an engine."""
    plan = Plan.parse(text)
    if plan.devices == 1:
        return None
    if plan.devices != plan.tensor:
        raise PlanError(
            f"An engine is cut over tensor alone, as in plan=tensor={plan.devices}; got {text!r}. For more requests at "
            "once run several servers."
        )
    if whole := _whole(model):
        raise PlanError(f"{whole} served by one device so far; leave plan out.")
    sizes = {"heads": model.num_heads, "kv_heads": model.num_kv_heads, "vocab": model.vocab_size}
    if problems := plan.problems({**sizes, "mlp": model.intermediate_size}):
        raise PlanError(f"The plan {plan} does not fit: {'; '.join(problems)}. Choose a tensor that divides them all.")
    return plan.mesh()


def _whole(model: DecoderConfig) -> str | None:
    """What is in the model that no mesh serves, as the beginning of a sentence."""
    if model.quantization is not None:
        return f"{model.quantization.format} weights are"
    if model.moe is not None:
        return "A mixture of experts is"
    if others := set(model.mixers) - {"attention"}:
        return f"Layers of {', '.join(sorted(others))} are"
    return None


def keeps_prefixes(model: DecoderConfig) -> bool:
    """Whether what is kept of a token hangs on it and those before it alone, and on nothing else."""
    ropes = [getattr(model, kind.rope) for kind in model.pattern if kind.rope]
    return not model.dimensions["states"] and not any(rope.by_length for rope in ropes)
