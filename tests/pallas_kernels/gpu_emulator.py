"""Runs Mosaic GPU kernels on a CPU, warpgroups interleaved at random, so that numbers, races and deadlocks show.

`emulate(f, seed)(*args)` evaluates f, and each Mosaic GPU kernel in it one block after another. In a block:
- A warpgroup runs until it waits; who goes on, and when copies and products in flight happen, is drawn from the seed,
  and so is, for each block, what is slow and what is fast.
- Memory starts as nan. A copy to shared memory makes its target nan at once and fills it later, arriving then; a copy
  to global memory reads its source later; so does a product, unless waited for. What is reused too early, or read
  before it was waited for, gives nan or wrong numbers.
- A product that is added to something is rounded before or not, as the compiler may fuse the two.
- A barrier that a warpgroup waits for with two phases behind it is an error, as its parity bit then lies; so are
  shared memory that is written and then copied without `commit_smem`, and a block where all wait.
- Blackwell's tensor memory and products are those of `gpu_tensor_core.py`.

Layouts, swizzles and the shapes of instructions are not checked here: the compiler does that.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var

from .gpu_memory import Ref, allocate, part_of, pick, product, unflatten, uninitialized
from .gpu_tensor_core import TensorCore

# What all threads of a warpgroup have to come to.
FOR_WARPGROUPS = {"commit_smem", "commit_tmem", "wait_load_tmem", "barrier_arrive", "barrier_wait", "core_map"}
CONTROL = {"jit", "pjit", "closed_call", "core_call", "custom_vmap_call", "custom_jvp_call", "custom_vjp_call"}


def emulate(f: Callable[..., Any], seed: int = 0) -> Callable[..., Any]:
    """f with its Mosaic GPU kernels emulated. What is not a kernel runs as ever."""

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        outs = _outer(closed.jaxpr, closed.consts, jax.tree.leaves(args), np.random.default_rng(seed))
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return run


def _inner(eqn: Any) -> tuple[Any, list[Any]]:
    closed = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)
    return (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, [])


def _outer(jaxpr: Any, consts: list[Any], args: list[Any], rng: np.random.Generator) -> list[Any]:
    env = _Environment([*jaxpr.constvars, *jaxpr.invars], [*consts, *args])
    for special, eqns in itertools.groupby(jaxpr.eqns, _has_kernel):
        if not special:
            _together(list(eqns), env, rng)
            continue
        for eqn in eqns:
            values = env.read(eqn.invars)
            kernel = eqn.primitive.name == "mpmd_map"
            env.write(eqn.outvars, _kernel(eqn, values, rng) if kernel else _outer(*_inner(eqn), values, rng))
    return env.read(jaxpr.outvars)


def _has_kernel(eqn: Any) -> bool:
    if eqn.primitive.name in CONTROL:
        return any(map(_has_kernel, _inner(eqn)[0].eqns))
    return eqn.primitive.name == "mpmd_map"


def _together(eqns: list[Any], env: "_Environment", rng: np.random.Generator) -> None:
    """As one program: each by itself, they would be compiled one by one."""
    made = list(dict.fromkeys(v for eqn in eqns for v in eqn.outvars))
    needed = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in made))

    def run(values: list[Any]) -> list[Any]:
        inside = _Environment(needed, values)
        for eqn in eqns:
            values = inside.read(eqn.invars)
            control = eqn.primitive.name in CONTROL
            inside.write(eqn.outvars, _outer(*_inner(eqn), values, rng) if control else _bind(eqn, values))
        return inside.read(made)

    env.write(made, jax.jit(run)(env.read(needed)))


def _broadcast(x: Any, shape: Any, broadcast_dimensions: Any, **_: Any) -> np.ndarray:
    wide = np.ones(len(shape), int)
    wide[list(broadcast_dimensions)] = np.shape(x)
    return np.broadcast_to(np.reshape(x, wide), shape)


def _iota(dtype: Any, shape: Any, dimension: int, **_: Any) -> np.ndarray:
    return np.indices(shape, np.dtype(dtype))[dimension]


def _divide(x: Any, y: Any) -> Any:
    if jnp.issubdtype(np.asarray(x).dtype, jnp.integer):
        return (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(np.asarray(x).dtype)
    return np.divide(x, y)


# What a kernel consists of, without the compilations that each shape costs where JAX runs it.
IN_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": lambda x, y, **_: np.multiply(x, y),
    "div": _divide,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "exp2": lambda x, **_: np.exp2(x),
    "log": lambda x, **_: np.log(x),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
    "convert_element_type": lambda x, new_dtype, **_: np.asarray(x).astype(new_dtype),
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reduce_max": lambda x, axes, **_: np.max(x, axis=axes),
    "reduce_sum": lambda x, axes, **_: np.sum(x, axis=axes),
    "integer_pow": lambda x, y: x**y,
    "optimization_barrier": lambda *xs: xs,
    "squeeze": lambda x, dimensions: np.squeeze(x, dimensions),
    "reshape": lambda x, new_sizes, **_: np.reshape(x, new_sizes),
}


def _evaluate(eqn: Any, values: list[Any]) -> list[Any]:
    rule = IN_NUMPY.get(eqn.primitive.name)
    if rule is None:
        return _bind(eqn, [jnp.asarray(v) for v in values])
    with np.errstate(all="ignore"):
        outs = rule(*values, **eqn.params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    return [np.asarray(out, v.aval.dtype) for out, v in zip(outs, eqn.outvars, strict=True)]


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


class _Environment:
    def __init__(self, variables: list[Any], values: list[Any]) -> None:
        self.values: dict[Any, Any] = dict(zip(variables, values, strict=True))

    def read(self, variables: Any) -> list[Any]:
        return [v.val if isinstance(v, Literal) else self.values[v] for v in variables]

    def write(self, variables: Any, values: Any) -> None:
        self.values.update(zip(variables, values, strict=True))


@dataclass
class _Block:
    """What the warpgroups of one block share."""

    place: dict[str, int]
    rng: np.random.Generator
    shared: dict[Any, list[Any]] = field(default_factory=dict)
    in_flight: list["Flight"] = field(default_factory=list)
    runs: dict[Any, Iterator[Callable[[], bool]]] = field(default_factory=dict)  # of warpgroups and warps
    pace: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """In some blocks loads are slow, in others products are, or whoever computes."""
        self.pace = {kind: 30.0 ** self.rng.integers(-1, 2) for kind in ("run", "load", "stor", "prod", "tens")}


@dataclass
class Flight:
    """A copy or product that has been issued and happens later."""

    act: Callable[[], None]
    owner: Any
    kind: str
    group: int = 0


def _kernel(eqn: Any, inputs: list[Any], rng: np.random.Generator) -> list[Any]:
    (jaxpr,), (mesh,) = eqn.params["jaxprs"], eqn.params["meshes"]
    assert not mesh.cluster, "clusters are not emulated"
    outs = [uninitialized(aval.shape, aval.dtype) for aval in eqn.params["out_avals"]]
    refs = [Ref(np.asarray(x)) for x in inputs] + [Ref(x) for x in outs]
    for place in rng.permutation(list(np.ndindex(*mesh.grid))):
        block = _Block(dict(zip(mesh.grid_names, map(int, place), strict=True)), rng)
        _run_block(block, [_Warpgroup(block, mesh.thread_name, i) for i in range(mesh.num_threads or 1)], jaxpr, refs)
    return [jnp.asarray(x) for x in outs]


def _run_block(block: _Block, groups: list["_Warpgroup"], jaxpr: Any, refs: list[Ref]) -> None:
    runs = block.runs
    runs.update({group.key: group.run(getattr(jaxpr, "jaxpr", jaxpr), refs) for group in groups})
    waiting: dict[Any, Callable[[], bool]] = {}
    while runs or block.in_flight:
        ready = [i for i in runs if i not in waiting or waiting[i]()]
        choices = [("run", i) for i in ready] + [("land", i) for i in range(len(block.in_flight))]
        if not choices:
            raise AssertionError(f"deadlock: all of {list(runs)} wait at {block.place}")
        paces = np.cumsum([block.pace["run" if what == "run" else block.in_flight[i].kind[:4]] for what, i in choices])
        what, i = choices[int(np.searchsorted(paces, block.rng.random() * paces[-1], side="right"))]
        if what == "land":
            _land(block, block.in_flight[i])
            continue
        waiting.pop(i, None)
        try:
            waiting[i] = next(runs[i])
        except StopIteration:
            del runs[i]
            lost = not runs and any(flight.kind.startswith("load") for flight in block.in_flight)
            assert not lost, f"the block at {block.place} ends before what it loads has come"


def _land(block: _Block, flight: Flight) -> None:
    """Products of one warpgroup happen in order, and so does what it copies; kinds pass each other."""
    for earlier in list(block.in_flight):
        if earlier.owner == flight.owner and earlier.kind == flight.kind:
            block.in_flight.remove(earlier)
            earlier.act()
        if earlier is flight:
            return


class _Warpgroup(TensorCore):
    """A warpgroup, or a warp of it. Its `run` is a generator of conditions: it goes on when the last one holds."""

    def __init__(self, block: _Block, axis: str | None, index: int, warp: tuple[Any, int] | None = None) -> None:
        self.block, self.axis, self.index, self.warp = block, axis, index, warp
        self.key = index if warp is None else (index, warp[1])
        self.loaded, self.stored = [], []
        self.split = 0  # conditions around that only some of its warps may fulfil
        self.scopes: dict[Any, int] = {}
        self.group = 0

    def run(self, jaxpr: Any, args: list[Any], consts: Any = ()) -> Iterator[Callable[[], bool]]:
        env = _Environment([*jaxpr.constvars, *jaxpr.invars], [*consts, *args])
        products: dict[Any, np.ndarray] = {}  # of float32s, not rounded
        of_warps: set[Any] = set()  # values that warps need not agree on
        for eqn in jaxpr.eqns:
            values = env.read(eqn.invars)
            if eqn.primitive.name == "mul" and eqn.outvars[0].aval.dtype == np.float32:
                products[eqn.outvars[0]] = np.multiply(*values, dtype=np.float64)
            elif eqn.primitive.name in ("add", "sub") and self.block.rng.integers(2):
                known = [v for v in eqn.invars if isinstance(v, Var) and v in products]
                values = [products[v] if v in known else x for v, x in zip(eqn.invars, values, strict=True)]
            name = eqn.primitive.name.removesuffix("_p")
            splits = any(isinstance(v, Var) and v in of_warps for v in eqn.invars)
            if splits or (name == "inline_mgpu" and eqn.params["mgpu_fn"].__name__.endswith("_of_warp")):
                of_warps.update(eqn.outvars)
            split_here = name == "cond" and isinstance(eqn.invars[0], Var) and eqn.invars[0] in of_warps
            self.split += split_here
            assert not self.split or name not in FOR_WARPGROUPS, f"{name} where the warps may have parted"
            rule = getattr(self, "_" + name, None)
            if eqn.primitive.name in CONTROL:
                inner, own = _inner(eqn)
                outs = yield from self.run(inner, values, own)
            elif rule is not None:
                outs = yield from rule(eqn, values)
            else:
                outs = _evaluate(eqn, values)
            env.write(eqn.outvars, outs)
            self.split -= split_here
        return env.read(jaxpr.outvars)

    # Control

    def _cond(self, eqn: Any, values: list[Any]) -> Any:
        branches = eqn.params["branches"]
        branch = branches[min(max(int(values[0]), 0), len(branches) - 1)]
        return (yield from self.run(branch.jaxpr, values[1:], branch.consts))

    def _while(self, eqn: Any, values: list[Any]) -> Any:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        consts, carry = values[: of_cond + of_body], values[of_cond + of_body :]
        while True:
            (more,) = yield from self.run(cond.jaxpr, [*consts[:of_cond], *carry], cond.consts)
            if not more:
                return carry
            carry = yield from self.run(body.jaxpr, [*consts[of_cond:], *carry], body.consts)

    def _scan(self, eqn: Any, values: list[Any]) -> Any:
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        assert len(values) == consts + carries, "scanned arrays are not emulated"
        body, carry = eqn.params["jaxpr"], values[consts:]
        for _ in range(eqn.params["length"]):
            carry = yield from self.run(body.jaxpr, [*values[:consts], *carry], body.consts)
        return carry

    def _run_scoped(self, eqn: Any, values: list[Any]) -> Any:
        jaxpr = eqn.params["jaxpr"]
        transforms = eqn.params.get("ref_transforms") or ((),) * len(jaxpr.invars)
        if not eqn.params["collective_axes"]:
            refs = [allocate(v.aval, t) for v, t in zip(jaxpr.invars, transforms, strict=True)]
        else:
            key = (id(eqn), self.scopes.setdefault(id(eqn), 0))
            self.scopes[id(eqn)] += 1
            if key not in self.block.shared:
                self.block.shared[key] = [allocate(v.aval, t) for v, t in zip(jaxpr.invars, transforms, strict=True)]
            refs = self.block.shared[key]
        return (yield from self.run(jaxpr, refs, values))

    def _run_state(self, eqn: Any, values: list[Any]) -> Any:
        refs = [v if isinstance(v, Ref | list) else Ref(np.array(v)) for v in values]
        yield from self.run(eqn.params["jaxpr"], refs)
        yield from self._wait_for("product", 0)
        return [v if v is ref else ref.array for v, ref in zip(values, refs, strict=True)]

    def _axis_index(self, eqn: Any, values: list[Any]) -> Any:
        name = eqn.params["axis_name"]
        if self.warp is not None:
            assert name == self.warp[0], "a warp knows no axis but its own: that is for the warpgroup to find out"
            return [np.int32(self.warp[1])]
        return [np.int32(self.index if name == self.axis else self.block.place[name])]
        yield

    def _core_map(self, eqn: Any, values: list[Any]) -> Any:
        """The four warps, each on its own, and then the warpgroup again."""
        jaxpr, name = eqn.params["jaxpr"], eqn.params["mesh"].axis_name
        warps = [_Warpgroup(self.block, self.axis, self.index, (name, i)) for i in range(4)]
        for warp in warps:
            self.block.runs[warp.key] = warp.run(jaxpr, [], values)
        yield lambda: not any(warp.key in self.block.runs for warp in warps)
        return []

    # Memory

    def _get(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["tree"]], values[1:])
        return [part_of(values[0], transforms).reshape(eqn.outvars[0].aval.shape).copy()]
        yield

    _load = _get

    def _swap(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["tree"]], values[2:])
        target = part_of(values[0], transforms)
        old = target.reshape(eqn.outvars[0].aval.shape).copy()
        target[...] = np.asarray(values[1]).reshape(target.shape)
        values[0].written_by.add(self.index)
        return [old]
        yield

    def _layout_cast(self, eqn: Any, values: list[Any]) -> Any:
        return values[:1]
        yield

    def _nothing(self, eqn: Any, values: list[Any]) -> Any:
        return []
        yield

    _set_max_registers = _nothing

    def _commit_smem(self, eqn: Any, values: list[Any]) -> Any:
        for refs in self.block.shared.values():
            for ref in refs:
                if isinstance(ref, Ref):
                    ref.written_by.discard(self.index)
        return []
        yield

    # Copies

    def _copy_gmem_to_smem(self, eqn: Any, values: list[Any]) -> Any:
        names = ("src_transforms_treedef", "dst_transforms_treedef", "barrier_transforms_treedef")
        of_source, of_target, of_barrier = unflatten([eqn.params[name] for name in names], values[3:])
        source, target = part_of(values[0], of_source), part_of(values[1], of_target)
        barrier = pick(values[2], of_barrier)
        assert source.shape == target.shape, (source.shape, target.shape)
        assert not values[1].written_by, "shared memory was written and is overwritten by a copy without commit_smem"
        target[...] = uninitialized(target.shape, target.dtype)

        def land() -> None:
            target[...] = source
            barrier.arrive()

        self.block.in_flight.append(Flight(land, self.key, f"load {len(self.block.in_flight)} {id(target)}"))
        return []
        yield

    def _copy_smem_to_gmem(self, eqn: Any, values: list[Any]) -> Any:
        names = ("src_transforms_treedef", "dst_transforms_treedef")
        leaves = values[2:-1] if eqn.params["has_user_predicate"] else values[2:]
        of_source, of_target = unflatten([eqn.params[name] for name in names], leaves)
        assert not values[0].written_by, "shared memory was written and is copied without commit_smem"
        assert eqn.params["reduction_op"] is None
        source, target = part_of(values[0], of_source), part_of(values[1], of_target)
        assert source.shape == target.shape, (source.shape, target.shape)
        if eqn.params["has_user_predicate"] and not values[-1]:
            return []

        def land() -> None:
            target[...] = source

        self.group += eqn.params["commit_group"]
        self.block.in_flight.append(Flight(land, self.key, "store", self.group))
        return []
        yield

    def _commit_group(self, eqn: Any, values: list[Any]) -> Any:
        self.group += 1
        return []
        yield

    def _wait_smem_to_gmem(self, eqn: Any, values: list[Any]) -> Any:
        yield from self._wait_for("store", int(values[0]) if values else eqn.params["n"])
        return []

    def _wait_for(self, kind: str, n: int) -> Iterator[Callable[[], bool]]:
        """Until at most n of this warpgroup's groups of `kind` are in flight."""

        def pending() -> int:
            flights = (f for f in self.block.in_flight if f.owner == self.key and f.kind == kind)
            return len({f.group for f in flights})

        if pending() > n:
            yield lambda: pending() <= n

    # Barriers

    def _barrier_arrive(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["transforms_treedef"]], values[1:])
        barrier = pick(values[0], transforms)
        given_early = barrier.ordered and self.loaded
        assert not given_early, "tensor memory was loaded and is given away without wait_load_tmem"
        barrier.arrive()
        return []
        yield

    def _barrier_wait(self, eqn: Any, values: list[Any]) -> Any:
        (transforms,) = unflatten([eqn.params["transforms_treedef"]], values[1:])
        barrier = pick(values[0], transforms)
        seen = barrier.seen.get(self.key, 0)
        assert barrier.phases <= seen + 1, "a barrier went on by two phases before it was waited for"
        yield lambda: barrier.phases > seen
        assert barrier.phases == seen + 1, "a barrier went on by two phases before it was waited for"
        barrier.seen[self.key] = seen + 1
        return []

    # Products

    def _wgmma_ref(self, eqn: Any, values: list[Any]) -> Any:
        trees = [eqn.params[name + "_transforms_tree"] for name in ("acc", "a", "b")]
        transforms = unflatten(trees, values[3:])
        acc = part_of(values[0], transforms[0])
        operands = zip(values[1:3], transforms[1:], strict=True)
        a, b = (part_of(x, t) if isinstance(x, Ref) else np.asarray(x) for x, t in operands)
        assert not any(x.written_by for x in values[1:3] if isinstance(x, Ref)), "a product of what was not committed"

        def land() -> None:
            acc[...] += np.asarray(product(a, b, acc.dtype))

        self.group += 1
        self.block.in_flight.append(Flight(land, self.key, "product", self.group))
        return []
        yield

    def _wgmma_wait(self, eqn: Any, values: list[Any]) -> Any:
        yield from self._wait_for("product", int(values[0]) if values else eqn.params["n"])
        return []

    def _wgmma_accumulator_deref(self, eqn: Any, values: list[Any]) -> Any:
        if eqn.params["wait_n"] is not None:
            yield from self._wait_for("product", eqn.params["wait_n"])
        return [values[0].array.copy()]

    def _wgmma_accumulator_store(self, eqn: Any, values: list[Any]) -> Any:
        yield from self._wait_for("product", 0)
        values[0].array[...] = np.asarray(values[1])
        return values[1:2]
