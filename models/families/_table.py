"""Tensor tables from names of modules: the parameters themselves say which tensors there are, so none is left out."""

from collections.abc import Callable, Iterator

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
# Of a weight in float8: its numbers, and the scales of its blocks.
THEIRS = {"values": "weight", "scales": "weight_scale_inv"}
ORDER = ("embed", "positions", "blocks", "final_norm", "unembed")


def table(
    config: DecoderConfig,
    layer: dict[str, str] = LAYER,
    outside: dict[str, str] = OUTSIDE,
    layers: str = "model.layers.{}.",
    fused: dict[str, tuple[str, ...]] | None = None,
    transposed: tuple[str, ...] = (),
    entry: Callable[[str, str, int], TensorEntry | None] = lambda begin, name, index: None,
) -> tuple[TensorEntry, ...]:
    """Every tensor of a model, in file order.

    Args:
        layer, outside: module names within and outside of the layers, ours to theirs; "{}" in theirs is an expert. A
            whole name, such as "moe.router.bias", comes before that of its module.
        layers: what begins the names of a layer's tensors.
        fused: their module -> ours, whose weights (and biases) it holds one below the other. These need no `layer`.
        transposed: their modules (of a layer) that keep weights as [in, out].
        entry: (what begins the names of the layer's tensors, the parameter, the layer's index in its stack) to the
            entry of a tensor that none of this is true for.
    """
    from ..parameters import param_shapes  # JAX, which reading a config does not need

    shapes = {name: like.shape for name, like in param_shapes(config).items()}
    stacked = [name for name in shapes if name.startswith(BLOCKS)]
    # Of each parameter of a block: the layers that it is stacked over.
    layers_of = {name: config.layers_with(name.split(".")[1]) for name in stacked}
    parts = {ours: theirs for theirs, several in (fused or {}).items() for ours in several}

    def entries() -> Iterator[TensorEntry]:
        for part in ORDER[:2]:
            yield from outer(part)
        for number in range(config.num_layers):
            for name in stacked:
                if number in layers_of[name]:
                    yield from within(layers.format(number), name, layers_of[name].index(number))
        for part in ORDER[3:]:
            yield from outer(part)

    def outer(module: str) -> Iterator[TensorEntry]:
        for name in shapes:
            own, _, kind = name.rpartition(".")
            if own == module:
                yield TensorEntry(f"{outside[module]}.{kind}", name)

    def within(begin: str, name: str, index: int) -> Iterator[TensorEntry]:
        short = name.removeprefix(BLOCKS)
        own, _, kind = short.rpartition(".")
        if special := entry(begin, name, index):
            yield special
            return
        if own in parts:
            rows = _rows(shapes, fused or {}, parts[own], own, kind)
            turned = parts[own] in transposed and kind == "weight"
            yield TensorEntry(f"{begin}{parts[own]}.{kind}", name, (index,), rows, turned)
            return
        theirs = layer.get(short) or f"{layer[own]}.{THEIRS.get(kind, kind)}"
        turned = kind == "scales" or (layer.get(own) in transposed and kind == "weight")
        if "{}" in theirs:
            for expert in range(shapes[name][1]):
                yield TensorEntry(f"{begin}{theirs.format(expert)}", name, (index, expert), None, turned)
        else:
            yield TensorEntry(f"{begin}{theirs}", name, (index,), None, turned)

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
