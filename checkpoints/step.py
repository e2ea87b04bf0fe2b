"""One step folder: its arrays written by Orbax, its state read back, the names and kinds of what may be stored."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ..sharding import agreement
from . import files, manifest, shared
from .arrays import StoredArray, open_array
from .errors import CheckpointError, DamagedCheckpoint, MismatchedCheckpoint, first_few
from .manifest import ArraySpec, Description, Manifest
from .stream import blocks

# Arrays are cut into files of at most this many bytes, so that checksums and reads are parallel.
_CHUNK_BYTES = 256 << 20
# Less than a layer of most models, whose layers are then copied once, straight from their files.
_COPY_BYTES = 4 << 20  # of the largest piece that is in memory twice on its way to a device
_ALIGNMENT = 64  # bytes


def flatten(state: Any) -> dict[str, Any]:
    """The leaves of a pytree by dotted path: {"params": {"embed.weight": x}} gives {"params.embed.weight": x}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise CheckpointError("two leaves of the state have the same dotted path; rename one")
    return flat


def spec_of(name: str, leaf: Any) -> ArraySpec:
    """Shape and dtype of a leaf. `CheckpointError` for what is not an array of numbers."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(f"{name} is a {type(leaf).__name__}; a state holds arrays only (np.int32(3), not 3)")
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"{name} is a typed random key; store jax.random.key_data(key)")
    if 0 in leaf.shape:
        raise CheckpointError(f"{name} has shape {tuple(leaf.shape)}: arrays without elements cannot be stored")
    if "/" in name or name.startswith("."):
        raise CheckpointError(f"{name!r} cannot be stored: paths must not begin with a dot or contain a slash")
    return ArraySpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)


class Readable(Protocol):
    """What has a shape and gives the numbers at an index: a `StoredArray`, or several tensors as one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray: ...


def to_device(stored: Readable, sharding: jax.sharding.Sharding | None, dtype: Any = None) -> jax.Array:
    """A stored array on its devices; each reads only its part. Cast to `dtype` on the way, when one is given."""

    def part(index: Any) -> np.ndarray:
        return _copy(stored, index or (), dtype)

    if sharding is None:
        return jax.device_put(part(()))
    return jax.make_array_from_callback(stored.shape, sharding, part)


def _copy(stored: Readable, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The numbers at an index in memory of their own, as no buffer must alias a file; copied in blocks."""
    full = (*index, *[slice(None)] * (len(stored.shape) - len(index)))
    spans = [one.indices(size)[:2] for one, size in zip(full, stored.shape, strict=True)]
    dtype = np.dtype(stored.dtype if dtype is None else dtype)
    out = _aligned([stop - start for start, stop in spans], dtype)
    for box in blocks(out.shape, dtype.itemsize, _COPY_BYTES):
        pairs = zip(box, spans, strict=False)
        inside = tuple(slice(start + own.start, start + own.stop) for own, (start, _) in pairs)
        out[box] = stored.read((*inside, *full[len(box) :]))
    return out


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array whose memory XLA's CPU devices take over as it is, instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def snapshot(leaf: Any) -> Any:
    """A leaf that stays as it is when `leaf` is donated during a save."""
    # On a CPU Orbax would keep a view of the device's buffer; elsewhere its copy to the host is the snapshot.
    if isinstance(leaf, jax.Array) and next(iter(leaf.sharding.device_set)).platform == "cpu":
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf


class _QuietOrbax(logging.Filter):
    """Drops what Orbax logs during our saves: its warnings do not apply, and its errors are raised as `SaveError`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def start_arrays(tmp: Path, flat: Mapping[str, Any]) -> Callable[[], None]:
    """Begin to write `flat` below the folder `tmp`, in the background. Gives the function that waits for it to be done.

    Several processes all call it, and each writes what its devices hold. NumPy arrays are copied first. With several
    processes an error is raised when waiting, and by all alike.
    """
    import orbax.checkpoint as ocp  # here, because it takes a second

    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    tree = {name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for name, leaf in flat.items()}
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=False,
        use_compression=False,
        type_handler_registry=registry,
    )
    barriers, options = shared.Barriers(), {}
    if agreement.count() > 1:
        options["async_options"] = ocp.options.AsyncOptions(barrier_sync_fn=barriers.wait)
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=barriers.name)
    checkpointer = ocp.AsyncCheckpointer(handler, **options)
    save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tree}
    quiet = _QuietOrbax()
    logging.getLogger("absl").addFilter(quiet)

    def close() -> None:
        checkpointer.close()
        logging.getLogger("absl").removeFilter(quiet)

    def finish() -> None:
        try:
            checkpointer.wait_until_finished()
        except Exception as error:
            barriers.fail(error)
            raise
        finally:
            close()

    try:
        checkpointer.save(tmp / manifest.ARRAYS, args=ocp.args.PyTreeSave(tree, save_args=save_args))
    except Exception as error:
        close()
        if agreement.count() == 1:
            raise
        return functools.partial(_fail, error, barriers)
    return finish


def _fail(error: Exception, barriers: shared.Barriers) -> None:
    barriers.fail(error)
    raise error


class StepWriter(files.NewFolder):
    """Writes one step folder. For `CheckpointStore` and conversion."""

    def finish(
        self,
        step: int,
        description: Description,
        arrays: Mapping[str, ArraySpec],
        known: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        """Add the tokenizer and the manifest, force all to the disk, and give the folder its name.

        `known`: checksums of files that need not be computed again.
        """
        for name, data in description.tokenizer_files.items():
            path = self.tmp / manifest.TOKENIZER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        manifest.write(self.tmp, step, description, arrays, known)
        self.commit()


def read_state(found: Manifest, like: Any) -> Any:
    """The arrays of a verified step in the structure of `like`. `MismatchedCheckpoint` when they do not fit it."""
    wanted = {name: (spec_of(name, leaf), leaf) for name, leaf in flatten(like).items()}
    stored = found.arrays
    differences = [
        f"{name}: {stored.get(name, 'absent')} in the checkpoint, wanted {spec}"
        for name, (spec, _) in wanted.items()
        if stored.get(name) != spec
    ]
    extra = [name for name in stored if name not in wanted]
    differences += [f"{name}: {stored[name]} in the checkpoint, not wanted" for name in extra]
    if differences:
        differences.sort(key=lambda text: not text.startswith("params."))  # parameters say most
        raise MismatchedCheckpoint(
            f"{found.folder} is a checkpoint of another model or training set-up; {len(differences)} arrays differ:\n"
            f"{first_few(differences)}\nUse the recipe it was trained with, or another output folder."
        )
    flat = [_restore_leaf(found, name, leaf) for name, (_, leaf) in wanted.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), flat)


def _restore_leaf(found: Manifest, name: str, leaf: Any) -> Any:
    stored = open_stored(found, name)
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(stored.read())
    restored = to_device(stored, getattr(leaf, "sharding", None))
    if restored.dtype != stored.dtype:
        raise MismatchedCheckpoint(f"{name} is {stored.dtype}, and would become {restored.dtype}: set jax_enable_x64")
    return restored


def open_stored(found: Manifest, name: str) -> StoredArray:
    """Array `name` of a step. `DamagedCheckpoint` when its file and the manifest disagree."""
    stored = open_array(found.folder / manifest.ARRAYS / name)
    if ArraySpec(stored.shape, stored.dtype.name) != found.arrays[name]:
        raise DamagedCheckpoint(f"{stored.folder} is not the {found.arrays[name]} that {manifest.NAME} describes")
    if stored.count > len(found.files):
        raise DamagedCheckpoint(f"{stored.folder} is cut into {stored.count:,} files, and {manifest.NAME} names fewer")
    return stored
