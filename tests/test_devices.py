"""Loss, gradient and weights do not depend on the devices or the processes that compute them.

The batch is packed so that responses straddle rows: any split, of rows or of tokens, cuts some.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deltal_jax.objective.aggregation import AGGREGATIONS, policy_gradient_loss, segment_sums
from deltal_jax.objective.surrogate import SURROGATES
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.parallel.sharding import ROW_AXES
from tests.processes import run_processes

N, T = 8, 16
LENGTHS = np.asarray([5, 1, 40, 3, 17, 2, 9, 24, 11])
S = len(LENGTHS)
#: Error allowed, as a part of Σ|w_i ℓ_it|: what sums in another order may differ by.
TOLERANCES = {"float32": 1e-6, "float64": 1e-12}
#: Sequence-level ratios here stray further than the default ranges, where no gradient would remain.
WIDE = {"gspo": {"clip_low": 0.1, "clip_high": 0.1}, "gspo_token": {"clip_low": 0.1}}
#: How tokens lie on the mesh: under jit, or inside shard_map with rows or tokens split.
LAYOUTS = {"jit": P(ROW_AXES), "rows": P(ROW_AXES), "tokens": P(None, ROW_AXES)}


def batch(dtype: str) -> dict[str, np.ndarray]:
    """[N, T] tokens of S responses, one after the other; a padding gap, and holes in the mask."""
    rng = np.random.default_rng(3)
    ids = np.full(N * T, S)
    ids[: LENGTHS[:2].sum()] = np.repeat(np.arange(2), LENGTHS[:2])
    ids[-LENGTHS[2:].sum() :] = np.repeat(np.arange(2, S), LENGTHS[2:])
    mask = (ids < S) & (rng.random(N * T) < 0.8)
    trained = np.bincount(ids[mask], minlength=S)
    features = rng.normal(size=(N, T, 3))
    theta = np.asarray([0.3, -0.2, 0.5])
    floats = {
        "theta": theta,
        "shift": rng.normal(size=(N, T)) * 0.3,
        "features": features,
        "old": -np.logaddexp(0.0, -features @ theta) + rng.normal(size=(N, T)) * 0.1,
        "advantages": rng.normal(size=S),
        "weights": trained**-0.75 / np.sum(trained**-0.75),
    }
    integers = {"ids": ids.reshape(N, T).astype(np.int32), "mask": mask.reshape(N, T)}
    return {name: array.astype(dtype) for name, array in floats.items()} | integers


def specs(layout: str) -> dict[str, P]:
    split = LAYOUTS[layout]
    whole = dict.fromkeys(("theta", "advantages", "weights"), P())
    return dict.fromkeys(("shift", "features", "old", "ids", "mask"), split) | whole


def losses(arrays: dict, axis_name: tuple[str, ...] | None) -> tuple[jax.Array, dict]:
    """The loss of every surrogate, [K], with its segment sums, scale and metrics."""
    ids, mask, weights = arrays["ids"], arrays["mask"], arrays["weights"]
    logits = arrays["features"] @ arrays["theta"]
    logprobs = jax.nn.log_sigmoid(logits) + arrays["shift"]
    of_token = jnp.pad(arrays["advantages"], (0, 1))[ids]
    token_losses = []
    for name, surrogate in SURROGATES.items():
        options = WIDE.get(name, {})
        if "num_segments" in inspect.signature(surrogate).parameters:
            tokens = {"segment_ids": ids, "mask": mask, "num_segments": S}
            options = options | tokens | {"axis_name": axis_name}
        token_losses.append(surrogate(logprobs, arrays["old"], of_token, **options))

    def reduced(values: jax.Array) -> tuple[jax.Array, dict]:
        loss, metrics = policy_gradient_loss(values, weights, ids, mask, axis_name=axis_name)
        sums, sizes = (
            segment_sums(x, ids, S, mask, axis_name=axis_name) for x in (values, jnp.abs(values))
        )
        metric = metrics["policy/token_loss"]
        return loss, {"sums": sums, "scale": jnp.sum(weights * sizes), "metric": metric}

    return jax.vmap(reduced)(jnp.stack(token_losses))


def with_gradients(function):
    """Values, others and gradients by the shared and by the token parameters of each surrogate."""

    def of_parameters(theta, shift, rest):
        values, others = function(rest | {"theta": theta, "shift": shift})
        return values, (values, others)

    def all_of(arrays):
        rest = {name: array for name, array in arrays.items() if name not in ("theta", "shift")}
        slopes, (values, others) = jax.jacrev(of_parameters, argnums=(0, 1), has_aux=True)(
            arrays["theta"], arrays["shift"], rest
        )
        return {"loss": values, "theta": slopes[0], "shift": slopes[1], **others}

    return all_of


def on_mesh(mesh: jax.sharding.Mesh, layout: str, dtype: str) -> dict:
    """`losses` and gradients on a mesh, in host memory."""
    function = functools.partial(losses, axis_name=None)
    if layout != "jit":
        function = jax.shard_map(
            functools.partial(losses, axis_name=ROW_AXES),
            mesh=mesh,
            in_specs=(specs(layout),),
            out_specs=P(),
        )
    with jax.enable_x64(dtype == "float64"):
        arrays = {
            name: jax.make_array_from_callback(
                array.shape, NamedSharding(mesh, specs(layout)[name]), array.__getitem__
            )
            for name, array in batch(dtype).items()
        }
        whole = NamedSharding(mesh, P())
        found = jax.jit(with_gradients(function), out_shardings=whole)(arrays)
        return jax.tree.map(np.asarray, found)


@functools.cache
def on_one_device(dtype: str) -> dict:
    with jax.enable_x64(dtype == "float64"):
        function = with_gradients(functools.partial(losses, axis_name=None))
        return jax.tree.map(np.asarray, jax.jit(function)(batch(dtype)))


def assert_same(found: dict, dtype: str) -> None:
    """Each surrogate's numbers within the tolerance, which is a part of its own Σ|w_i ℓ_it|."""
    want = on_one_device(dtype)
    for number, name in enumerate(SURROGATES):
        allowed = TOLERANCES[dtype] * want["scale"][number]
        for what in ("loss", "theta", "shift"):
            np.testing.assert_allclose(
                found[what][number], want[what][number], rtol=0, atol=allowed, err_msg=name
            )
    # Sums are not weighed: theirs is the tolerance of a sum of tokens of size 1.
    tolerance = {"rtol": TOLERANCES[dtype] * 10, "atol": TOLERANCES[dtype] * 10}
    np.testing.assert_allclose(found["sums"], want["sums"], **tolerance)
    np.testing.assert_allclose(found["metric"][0], want["metric"][0], **tolerance)
    np.testing.assert_array_equal(found["metric"][1], want["metric"][1])


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return make_mesh(fsdp=min(devices, 2), devices=jax.devices()[:devices])


def test_the_batch_exercises_every_surrogate_and_cuts_responses_at_every_split():
    want, ids = on_one_device("float64"), batch("float64")["ids"]
    assert want["loss"].dtype == np.float64 and on_one_device("float32")["loss"].dtype == np.float32
    assert np.all(np.abs(want["loss"]) > 1e-3 * want["scale"])
    assert np.all(np.abs(want["theta"]).max(axis=1) > 1e-3 * want["scale"])
    assert np.all(np.abs(want["shift"]).max(axis=(1, 2)) > 1e-3 * want["scale"])
    for axis in (0, 1):
        for devices in (2, 4, 8):
            parts = [set(part.flat) - {S} for part in np.split(ids, devices, axis)]
            assert any(a & b for a, b in itertools.pairwise(parts))


#: float64 tells a wrong term from rounding; float32 needs no more than the finest split. Four
#: devices are those of two processes, below.
DEVICES = [(2, "float64"), (8, "float64"), (8, "float32")]


@pytest.mark.parametrize(("devices", "dtype"), DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_loss_and_gradient_of_every_surrogate_are_those_of_one_device(layout, devices, dtype):
    assert_same(on_mesh(mesh_of(devices), layout, dtype), dtype)


def in_processes() -> dict[str, np.ndarray]:
    """Every layout on the devices of all processes; runs in each of them."""
    mesh = make_mesh(fsdp=2)
    assert jax.process_count() == 2 and len(mesh.devices.flat) == 4
    found = {}
    for layout in LAYOUTS:
        leaves, _ = jax.tree.flatten(on_mesh(mesh, layout, "float64"))
        found |= {f"{layout}{number}": leaf for number, leaf in enumerate(leaves)}
    return found


def test_two_processes_find_the_loss_and_gradient_of_one_device():
    """In float64 alone: another process compiles everything anew, and that is most of the time."""
    tree = jax.tree.structure(on_one_device("float64"))
    for found in run_processes("tests.test_devices:in_processes", count=2, devices_each=2):
        for layout in LAYOUTS:
            leaves = [found[f"{layout}{number}"] for number in range(tree.num_leaves)]
            assert_same(jax.tree.unflatten(tree, leaves), "float64")


B = 16
RESPONSES = np.asarray([3, 9, 1, 0, 20, 5, 5, 12, 700, 2, 31, 8, 1, 1, 64, 0], np.int32)
SCOPES = {
    "batch": None,
    "mini-batch": np.asarray([0, 1, 0, 1, 0, 1, 2, 2, 2, 3, 3, 3, 0, 1, 2, 3], np.int32),
    "group": np.repeat(np.arange(4, dtype=np.int32), 4),
}
#: What the methods need beside lengths. Where a method's only ids are positional, they are the
#: scope.
RHO = np.asarray([0.5, 0.2, 0.1])
SCOPED_BY_POSITION = ("prompt_mean", "local_token_mean")


def all_weights(lengths, advantages, where, scopes):
    """The weights of every method in every scope that it takes, by (method, scope)."""
    found = {}
    for method, function in AGGREGATIONS.items():
        positional = {
            "balanced": (advantages,),
            "inverse_variance": ({"rho": jnp.asarray(RHO, advantages.dtype)},),
        }.get(method, ())
        takes_scopes = "scope_ids" in inspect.signature(function).parameters
        for scope, ids in scopes.items():
            if method in SCOPED_BY_POSITION:
                ids = jnp.zeros_like(scopes["group"]) if ids is None else ids
                found[method, scope] = function(lengths, ids, where=where)
            elif takes_scopes:
                found[method, scope] = function(lengths, *positional, where=where, scope_ids=ids)
            elif scope == "batch":
                found[method, scope] = function(lengths, *positional, where=where)
    return found


@functools.cache
def weights_on(devices: int, dtype: str) -> dict:
    """`all_weights` of responses that are split over `devices`, in host memory."""
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        # Lengths of float64 make the weights float64: integers alone give float32 at default.
        inputs = (RESPONSES.astype(dtype), rng.normal(size=B).astype(dtype), RESPONSES != 5, SCOPES)
        split = NamedSharding(mesh_of(devices), P(ROW_AXES))
        placed = jax.tree.map(lambda array: jax.device_put(array, split), inputs)
        return jax.tree.map(np.asarray, jax.jit(all_weights)(*placed))


@pytest.mark.parametrize(("devices", "dtype"), DEVICES)
def test_weights_of_every_method_and_scope_are_those_of_one_device(devices, dtype):
    found, want = weights_on(devices, dtype), weights_on(1, dtype)
    assert {method for method, _ in want} == set(AGGREGATIONS)
    assert sum(scope == "group" for _, scope in want) == 8  # all but token_sum and balanced
    for which, weights in want.items():
        assert weights.dtype == dtype and np.any(weights > 0)
        np.testing.assert_allclose(
            found[which], weights, rtol=TOLERANCES[dtype], atol=0, err_msg=str(which)
        )
