"""Where arrays live on the mesh: two tables, from parameter paths to logical axes to mesh axes.

Modules know no mesh, but for kernels that the compiler does not split (`model/kernels.py`).
Everything here works on shapes too (`jax.ShapeDtypeStruct`), so that plans and restores need no
arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deltal_jax.model.lora import TARGETS
from deltal_jax.types import Bucket

#: Path of a parameter → logical axis of each of its dimensions.
PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embed/embedding": ("vocab", "embed"),
    "blocks/attention_norm/scale": ("layers", "norm"),
    "blocks/attention_post_norm/scale": ("layers", "norm"),
    "blocks/attention/q_norm/scale": ("layers", "norm"),
    "blocks/attention/k_norm/scale": ("layers", "norm"),
    "blocks/attention/q/kernel": ("layers", "embed", "heads"),
    "blocks/attention/k/kernel": ("layers", "embed", "kv_heads"),
    "blocks/attention/v/kernel": ("layers", "embed", "kv_heads"),
    "blocks/attention/o/kernel": ("layers", "heads", "embed"),
    "blocks/attention/q/bias": ("layers", "heads"),
    "blocks/attention/k/bias": ("layers", "kv_heads"),
    "blocks/attention/v/bias": ("layers", "kv_heads"),
    "blocks/attention/o/bias": ("layers", "embed"),
    "blocks/mlp_norm/scale": ("layers", "norm"),
    "blocks/mlp_post_norm/scale": ("layers", "norm"),
    "blocks/mlp/gate/kernel": ("layers", "embed", "mlp"),
    "blocks/mlp/up/kernel": ("layers", "embed", "mlp"),
    "blocks/mlp/down/kernel": ("layers", "mlp", "embed"),
    "blocks/mlp/gate/bias": ("layers", "mlp"),
    "blocks/mlp/up/bias": ("layers", "mlp"),
    "blocks/mlp/down/bias": ("layers", "embed"),
    "norm/scale": ("norm",),
    "head/kernel": ("embed", "vocab"),
}

for _target in TARGETS.values():  # adapters split like the matrix that they are beside
    _layers, _inputs, _outputs = PARAMETER_AXES[f"blocks/{_target}/kernel"]
    PARAMETER_AXES[f"blocks/{_target}/lora/lora_a"] = (_layers, _inputs, "rank")
    PARAMETER_AXES[f"blocks/{_target}/lora/lora_b"] = (_layers, "rank", _outputs)

#: Logical axis → mesh axis that splits it; None: no axis does.
MESH_AXES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,  # scanned over: each step of the scan needs one layer on all devices
    "norm": None,  # a few kilobytes
    "rank": None,  # of adapters
}

#: Mesh axes that split rows of tokens.
ROW_AXES = ("data", "fsdp")


def parameter_shardings(
    mesh: Mesh | AbstractMesh, params: Any, *, gathered: tuple[str, ...] = ()
) -> Any:
    """The sharding of each parameter, as a pytree of NamedSharding; whole over the mesh axes
    `gathered`.

    `params` is the pure dict of `model.transformer.split_model`, of arrays or shapes. A dimension
    that its mesh axis does not divide stays whole: see `wholly_replicated` for what that costs.
    Raises KeyError, naming it, for a path that `PARAMETER_AXES` has not, and ValueError for a
    parameter with other dimensions than the table says.
    """
    found = _shardings(mesh, params, lambda path, shape: PARAMETER_AXES.get(path))
    return jax.tree.map(
        lambda own: NamedSharding(
            mesh, PartitionSpec(*(None if axis in gathered else axis for axis in own.spec))
        ),
        found,
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of each leaf of a state that mirrors the parameters, wherever they stand in it.

    A leaf whose path ends in that of a parameter is sharded like it, as Adam's `0/mu/embed/…` and
    the `params/…` of a TrainState; scalars (counts, keys) are replicated. Raises as
    `parameter_shardings`.
    """

    def mirrored(path: str, shape: tuple[int, ...]) -> tuple[str, ...] | None:
        parts = path.split("/")
        # The longest match first: "blocks/…/scale" must not be taken for a shorter parameter.
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((PARAMETER_AXES[end] for end in ends if end in PARAMETER_AXES), None)
        return () if found is None and shape == () else found

    return _shardings(mesh, state, mirrored)


def wholly_replicated(shardings: Any, tree: Any, over: int = 2**20) -> list[str]:
    """Paths of arrays of more than `over` bytes that every device holds whole, though the mesh has
    fsdp or tensor devices to split them over. Empty on a mesh that only has the data axis."""

    def path_if_replicated(path: Any, leaf: Any, sharding: NamedSharding) -> str | None:
        splitting = sharding.mesh.shape["fsdp"] * sharding.mesh.shape["tensor"]
        large = leaf.size * leaf.dtype.itemsize > over
        return _name(path) if splitting > 1 and large and sharding.is_fully_replicated else None

    # None is an empty subtree, so the paths that are left are the leaves.
    return jax.tree.leaves(jax.tree_util.tree_map_with_path(path_if_replicated, tree, shardings))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def host_key(key: jax.Array) -> jax.Array:
    """A random key that lies on the whole mesh, for this process's own use."""
    data = jnp.asarray(np.asarray(jax.random.key_data(key)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays of rows [N, …]: rows over data and fsdp, and the same on all tensor devices."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def half_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [2, N, …] of two halves of rows: each lies as `row_sharding` says."""
    return NamedSharding(mesh, PartitionSpec(None, ROW_AXES))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts `row_sharding` splits rows into; rows of a bucket are a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_bucket(mesh: Mesh, bucket: Bucket) -> Bucket:
    """A bucket on the mesh: [N, T] fields split by rows, those of responses, [B], replicated.

    Each process holds the whole bucket in host memory and copies only what its own devices need;
    with several processes the bucket must be the same in all of them. Fields that are None stay so.
    Raises ValueError where the rows are no multiple of `row_shards(mesh)`: padding would change the
    shape, which is the business of `training.buckets`.
    """

    def place(array: np.ndarray | jax.Array) -> jax.Array:
        array = np.asarray(array)
        rows = array.ndim == 2
        if rows and array.shape[0] % row_shards(mesh):
            raise ValueError(
                f"a bucket of {array.shape[0]} rows does not split over {row_shards(mesh)} devices"
                f" (data={mesh.shape['data']} × fsdp={mesh.shape['fsdp']})"
            )
        sharding = row_sharding(mesh) if rows else replicated_sharding(mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, bucket)


def _shardings(
    mesh: Mesh | AbstractMesh,
    tree: Any,
    axes_of: Callable[[str, tuple[int, ...]], tuple[str, ...] | None],
) -> Any:
    """`axes_of` gives the logical axes by path and shape; None: unknown."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name, shape = _name(path), leaf.shape
        logical = axes_of(name, shape)
        if logical is None:
            raise KeyError(f"{name}: not a parameter of PARAMETER_AXES (parallel/sharding.py)")
        if len(logical) != len(shape):
            raise ValueError(f"{name}: dimensions {shape} where the table has {logical}")
        return NamedSharding(mesh, _spec(mesh, logical, shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _spec(
    mesh: Mesh | AbstractMesh, logical: tuple[str, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """The mesh axis of each dimension, None where it does not divide it."""
    axes = (MESH_AXES[name] for name in logical)
    pairs = zip(axes, shape, strict=True)
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in pairs)
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
