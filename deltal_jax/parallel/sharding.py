"""Where arrays live on the mesh: two tables, from parameter paths to logical axes to mesh axes.

Modules know no mesh, but for kernels that the compiler does not split (`model/kernels.py`); where
the compiler needs to be told how an activation lies, they say it by logical names: `constrain`.
Everything here works on shapes too (`jax.ShapeDtypeStruct`), so that plans and restores need no
arrays.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
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

#: Logical axis → the mesh axes that split it, of parameters and of activations.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),  # scanned over: each step of the scan needs one layer on all devices
    "norm": (),  # a few kilobytes
    "rank": (),  # of adapters
    "rows": ("data", "fsdp"),
    "tokens": ("context",),
    "slots": ("data", "fsdp", "context"),  # of the sampler, whose rows are a token long
    "act_embed": (),  # the residual stream is whole where its tokens are
    "act_heads": ("tensor",),
}
#: Mesh axes that split rows of tokens, and those that split the sampler's slots.
ROW_AXES, SLOT_AXES = MESH_AXES["rows"], MESH_AXES["slots"]


def parameter_shardings(
    mesh: Mesh | AbstractMesh, params: Any, *, gathered: tuple[str, ...] = ()
) -> Any:
    """The sharding of each parameter, as a pytree of NamedSharding; whole over the mesh axes
    `gathered`.

    `params` is the pure dict of `model.transformer.split_model`, of arrays or shapes. A dimension
    that its mesh axes do not divide stays whole: see `wholly_replicated` for what that costs.
    Raises KeyError, naming it, for a path that `PARAMETER_AXES` has not, and ValueError for a
    parameter with other dimensions than the table says.
    """
    return _shardings(mesh, params, lambda path, shape: PARAMETER_AXES.get(path), gathered)


def state_shardings(mesh: Mesh | AbstractMesh, state: Any) -> Any:
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
    devices to split them over. Empty on a mesh that only has the data axis."""

    def path_if_replicated(path: Any, leaf: Any, sharding: NamedSharding) -> str | None:
        splitting = sharding.mesh.size // sharding.mesh.shape["data"]
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


def slot_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays of the sampler's slots [S, …]: over all but tensor, which has the same."""
    return NamedSharding(mesh, PartitionSpec(SLOT_AXES))


def token_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays of tokens [N, T, …]: rows over data and fsdp, tokens over context."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES, MESH_AXES["tokens"]))


def half_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [2, N, T] of two halves of rows: each lies as `token_sharding` says."""
    return NamedSharding(mesh, PartitionSpec(None, ROW_AXES, MESH_AXES["tokens"]))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts `token_sharding` splits rows into; rows of a bucket are a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def slot_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts `slot_sharding` splits slots into."""
    return row_shards(mesh) * mesh.shape["context"]


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """`x` with its first dimensions split as `MESH_AXES` says of their logical names; the rest is
    left to the compiler. What their mesh axes do not divide stays whole. Does nothing without a
    mesh in the context (`jax.set_mesh`), and nothing by axes that are manual there."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    own = _spec(mesh, names, x.shape[: len(names)], mesh.manual_axes)
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(names))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*own, *rest))


def tokens_are_split() -> bool:
    """Whether the context's mesh splits the tokens of a row: then rows and tokens must not be
    merged into one dimension, of which no device would hold consecutive ones."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = MESH_AXES["tokens"][0]
    return not mesh.empty and tokens not in mesh.manual_axes and mesh.shape.get(tokens, 1) > 1


def by_device(function: Callable[..., Any], shared: Any, *tokens: jax.Array) -> Any:
    """`function(axes, shared, *tokens)` on the tokens [n, t, …] that each device of the context's
    mesh has of [N, T, …]; the results are such, too. `axes` are those that they are split over, for
    what is said between devices: none without a mesh.

    What is `shared` is gathered once, but for what "tensor" splits, and its gradient is added over
    the devices once: left to the compiler a loop would do both in each of its rounds.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return function((), shared, *tokens)
    split = PartitionSpec(ROW_AXES, MESH_AXES["tokens"])
    return jax.shard_map(
        functools.partial(function, SLOT_AXES),
        in_specs=(PartitionSpec(), *(split for _ in tokens)),
        out_specs=split,
        axis_names=set(SLOT_AXES),
        check_vma=False,  # loops of arrays that start alike on all devices
    )(shared, *tokens)


def shard_bucket(mesh: Mesh, bucket: Bucket) -> Bucket:
    """A bucket on the mesh: [N, T] fields split by rows and tokens, those of responses, [B],
    replicated.

    Each process holds the whole bucket in host memory and copies only what its own devices need;
    with several processes the bucket must be the same in all of them. Fields that are None stay so.
    Raises ValueError where the rows are no multiple of `row_shards(mesh)`, or the tokens of the
    context axis: padding would change the shape, which is the business of `training.buckets`.
    """
    context = mesh.shape["context"]

    def place(array: np.ndarray | jax.Array) -> jax.Array:
        array = np.asarray(array)
        rows = array.ndim == 2
        if rows and array.shape[0] % row_shards(mesh):
            raise ValueError(
                f"a bucket of {array.shape[0]} rows does not split over {row_shards(mesh)} devices"
                f" (data={mesh.shape['data']} × fsdp={mesh.shape['fsdp']})"
            )
        if rows and array.shape[1] % context:
            raise ValueError(
                f"a bucket of rows of {array.shape[1]} tokens does not split over context={context}"
            )
        sharding = token_sharding(mesh) if rows else replicated_sharding(mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, bucket)


def _shardings(
    mesh: Mesh | AbstractMesh,
    tree: Any,
    axes_of: Callable[[str, tuple[int, ...]], tuple[str, ...] | None],
    gathered: Collection[str] = (),
) -> Any:
    """`axes_of` gives the logical axes by path and shape; None: unknown."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name, shape = _name(path), leaf.shape
        logical = axes_of(name, shape)
        if logical is None:
            raise KeyError(f"{name}: not a parameter of PARAMETER_AXES (parallel/sharding.py)")
        if len(logical) != len(shape):
            raise ValueError(f"{name}: dimensions {shape} where the table has {logical}")
        return NamedSharding(mesh, PartitionSpec(*_spec(mesh, logical, shape, gathered)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _spec(
    mesh: Mesh | AbstractMesh,
    logical: Sequence[str],
    shape: Sequence[int],
    without: Collection[str] = (),
) -> list[str | tuple[str, ...] | None]:
    """The mesh axes of each dimension, those of more than one device, but for some `without` which
    it is; the first of them where all do not divide it, and None where that does not."""
    found: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical, shape, strict=True):
        axes = tuple(axis for axis in MESH_AXES[name] if axis not in without)
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1) or axes[:1]
        choices = (axes, axes[:1])
        own = next((x for x in choices if size % math.prod(mesh.shape[a] for a in x) == 0), ())
        found.append(own[0] if len(own) == 1 else own or None)
    return found


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
