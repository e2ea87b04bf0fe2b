"""Tensor tables from names of modules: the parameters themselves say which tensors there are, so none is left out."""

from collections.abc import Iterator

from ..config import DecoderConfig
from . import TensorEntry

BLOCKS = "blocks."
# Our module -> Hugging Face's: what most families call alike. A layer's begin with what `LAYERS` makes.
OUTSIDE = {"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"}
ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
FEED_FORWARD = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
LAYER = {**ATTENTION, **FEED_FORWARD, **NORMS}
ORDER = ("embed", "positions", "blocks", "final_norm", "unembed")


def table(
    config: DecoderConfig,
    layer: dict[str, str] = LAYER,
    outside: dict[str, str] = OUTSIDE,
    layers: str = "model.layers.{}.",
    fused: dict[str, tuple[str, ...]] | None = None,
    transposed: tuple[str, ...] = (),
) -> tuple[TensorEntry, ...]:
    """Every tensor of a model, in file order.

    Args:
        layer, outside: module names within and outside of the layers, ours to theirs; "{}" in theirs is an expert.
        layers: what begins the names of a layer's tensors.
        fused: their module -> ours, whose weights (and biases) it holds one below the other. These need no `layer`.
        transposed: their modules (of a layer) that keep weights as [in, out].
    """
    from ..decoder import param_shapes  # JAX, which reading a config does not need

    shapes = {name: like.shape for name, like in param_shapes(config).items()}

    def entries() -> Iterator[TensorEntry]:
        for part in ORDER[:2]:
            yield from outer(part)
        for number in range(config.num_layers):
            yield from within(number)
        for part in ORDER[3:]:
            yield from outer(part)

    def outer(module: str) -> Iterator[TensorEntry]:
        for name in shapes:
            own, _, kind = name.rpartition(".")
            if own == module:
                yield TensorEntry(f"{outside[module]}.{kind}", name)

    def within(number: int) -> Iterator[TensorEntry]:
        begin = layers.format(number)
        parts = {ours: theirs for theirs, several in (fused or {}).items() for ours in several}
        for name, shape in shapes.items():
            if not name.startswith(BLOCKS):
                continue
            own, _, kind = name.removeprefix(BLOCKS).rpartition(".")
            if own in parts:
                rows = _rows(shapes, fused or {}, parts[own], own, kind)
                turned = parts[own] in transposed and kind == "weight"
                yield TensorEntry(f"{begin}{parts[own]}.{kind}", name, (number,), rows, turned)
                continue
            theirs = layer[own]
            turned = theirs in transposed and kind == "weight"
            if "{}" in theirs:
                for expert in range(shape[1]):
                    yield TensorEntry(f"{begin}{theirs.format(expert)}.{kind}", name, (number, expert), None, turned)
            else:
                yield TensorEntry(f"{begin}{theirs}.{kind}", name, (number,), None, turned)

    return tuple(entries())


def _rows(
    shapes: dict[str, tuple[int, ...]], fused: dict[str, tuple[str, ...]], theirs: str, own: str, kind: str
) -> tuple[int, int, int]:
    start = 0
    for module in fused[theirs]:
        size = shapes[f"{BLOCKS}{module}.{kind}"][1]
        if module == own:
            return start, start + size, 1
        start += size
    raise AssertionError(own)
