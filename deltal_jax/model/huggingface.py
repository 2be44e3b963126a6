"""Hugging Face checkpoint folders, in and out, without torch: config.json and safetensors.

Reading goes straight into (sharded) arrays: each process copies only the slices that its own
devices need, a few threads at once, and casts and turns them on the way. A stacked parameter of
ours is one tensor a layer on disk; matrices are stored as [out, in], the transpose of ours.
"""

import collections
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors.numpy import save_file

from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.families import TensorName, architecture_of, config_of, tensor_names
from deltal_jax.model.lora import TARGETS
from deltal_jax.model.tensor_files import INDEX, SINGLE, TensorFiles, read_object
from deltal_jax.model.transformer import abstract_params
from deltal_jax.parallel.sharding import parameter_shardings

CONFIG = "config.json"
#: The field of it that says how many tokens a model was made for.
CONTEXT = "max_position_embeddings"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Tensors that some exporters write although they are computed: rotary tables.
COMPUTED = re.compile(r"\.rotary_emb\.")
SHARD_BYTES = 5 * 10**9

#: Threads that read: while some wait for the disk, others cast and turn.
READERS = 4
#: Host bytes of parameters that are being read and not yet on their devices, unless one alone is
#: larger.
AHEAD_BYTES = 512 * 2**20


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder. Raises UserError where there is none, or no JSON."""
    if not (folder / CONFIG).exists():
        raise UserError(f"model.path: {folder} has no {CONFIG}")
    return read_object(folder / CONFIG)


def load_architecture(folder: Path) -> Architecture:
    """The architecture of a checkpoint folder."""
    return architecture_of(read_config(folder))


def check_vocabulary(arch: Architecture, ids: int) -> None:
    """Raises UserError where a tokenizer of so many ids has more than the model has rows."""
    if ids > arch.vocab:
        raise UserError(
            f"model.path: the tokenizer has ids up to {ids - 1}, but the model has only "
            f"{arch.vocab} rows (vocab_size); the files are of different models"
        )


def load_params(
    folder: Path, arch: Architecture, *, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> Any:
    """The parameters of a checkpoint folder as our pytree, on the mesh or on the default device.

    On their way to other devices, at most `AHEAD_BYTES` of parameters (or the largest one's slices)
    are in the host's memory at a time, and a few megabytes a reader. A CPU device takes that memory
    over, none is needed beside it; the first program that donates it copies it.

    Raises one UserError that lists all missing, extra and misshapen tensors.
    """
    files = check_tensors(folder, arch)
    _check_tied(files, arch)
    abstract = abstract_params(arch)
    names = tensor_names(arch)
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = parameter_shardings(mesh, abstract)
    leaves, tree = jax.tree.flatten_with_path(abstract)
    done: list[jax.Array] = []
    reading: collections.deque[_Reading] = collections.deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for (path, shape), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
            begun, bound = _Reading(shape.shape, sharding, dtype), _ahead(sharding)
            while reading and begun.bytes + sum(x.bytes for x in reading) > bound:
                done.append(reading.popleft().array())
            begun.start(pool, files, names[_name(path)])
            reading.append(begun)
        done += [x.array() for x in reading]
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nothing more needs to be read
    return jax.tree.unflatten(tree, done)


def _ahead(sharding: Any) -> float:
    """Bytes that may be on their way: what is read for a CPU device is already in its place."""
    on_cpu = all(device.platform == "cpu" for device in sharding.device_set)
    return math.inf if on_cpu else AHEAD_BYTES


class _Reading:
    """A parameter on its way from the disk: the slices that this process's devices hold."""

    def __init__(self, shape: tuple[int, ...], sharding: Any, dtype: Any):
        self.shape, self.sharding, self.dtype = shape, sharding, np.dtype(dtype)
        indices = sharding.addressable_devices_indices_map(shape).values()
        # Devices that hold the same slice share one read.
        self.indices = {str(index): index for index in indices}
        lengths = [
            [len(range(*own.indices(n))) for own, n in zip(index, shape, strict=True)]
            for index in self.indices.values()
        ]
        self.sizes = dict(zip(self.indices, lengths, strict=True))
        self.bytes = sum(math.prod(size) for size in lengths) * self.dtype.itemsize

    def start(self, pool: ThreadPoolExecutor, files: TensorFiles, tensor: TensorName) -> None:
        """Allocate, and let the pool read."""
        self.parts = {key: _aligned(size, self.dtype) for key, size in self.sizes.items()}
        self.pending: list[Future] = []
        for key, index in self.indices.items():
            for name, own, into in self._tensors(tensor, index, self.parts[key]):
                for rows, piece in files.pieces(name, own, into):
                    self.pending.append(pool.submit(files.read, name, rows, piece))

    def _tensors(
        self, tensor: TensorName, index: tuple[slice, ...], part: np.ndarray
    ) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
        """The tensors on disk that a slice of ours comes from, which slice of them, and where it
        goes."""
        if "{layer}" in tensor.name:
            layers = range(*index[0].indices(self.shape[0]))
            parts = [(tensor.name.format(layer=layer), index[1:]) for layer in layers]
            targets: Any = part
        else:
            parts, targets = [(tensor.name, index)], [part]
        for (name, own), into in zip(parts, targets, strict=True):
            yield (name, own[::-1], into.T) if tensor.transposed else (name, own, into)

    def array(self) -> jax.Array:
        """Wait for the disk, then for the devices: the host's copy is not needed any more."""
        for piece in self.pending:
            piece.result()
        found = jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[str(index)]
        )
        return jax.block_until_ready(found)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is: it copies what does not start at a multiple of
    64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def save_params(
    folder: Path, params: Any, arch: Architecture, *, dtype: Any = jnp.bfloat16
) -> None:
    """Write parameters as safetensors shards of at most 5 GB with their index, in a folder that
    exists."""
    written: list[list[str]] = []  # names of the tensors of each shard
    shard: dict[str, np.ndarray] = {}
    size, total = 0, 0

    def write() -> None:
        # How many there will be, which their names say, is known only at the end.
        _save(shard, folder / f"{len(written)}.part")
        written.append(list(shard))
        shard.clear()

    for name, tensor in _tensors(params, arch, dtype):
        if size and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(written) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file that others may read: the library makes it for its owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def export(
    folder: Path,
    params: Any,
    arch: Architecture,
    *,
    config: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
    dtype: Any = jnp.bfloat16,
    field: str = "--to",
) -> None:
    """A new checkpoint folder, as a whole or not at all: weights, config and other `files`.

    `config` is that of the checkpoint that the model came from; None describes the architecture.
    Raises UserError, naming the `field` that said so, where the folder exists or cannot be made.
    """
    with new_folder(folder, field) as partial:
        described = dict(config_of(arch) if config is None else config)
        described.pop("torch_dtype", None)
        described["dtype"] = jnp.dtype(dtype).name
        write_json(partial / CONFIG, described)
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        save_params(partial, params, arch, dtype=dtype)


def export_adapters(
    folder: Path,
    params: Any,
    arch: Architecture,
    *,
    base: str,
    revision: str | None = None,
    files: dict[str, bytes] | None = None,
    dtype: Any = jnp.float32,
) -> None:
    """A new folder in the format of PEFT, as a whole or not at all: the adapters, their config and
    other `files`. `base` and `revision` say which checkpoint they belong to, as `model.path` and
    `model.revision` do.

    Raises UserError where the folder exists.
    """
    lora, names = arch.lora, tensor_names(arch)
    assert lora is not None
    tensors = {}
    for target in lora.targets:
        path = TARGETS[target].split("/")
        adapter = params["blocks"][path[0]][path[1]]["lora"]
        module = names[f"blocks/{TARGETS[target]}/kernel"].name.removesuffix(".weight")
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, matrix in enumerate(np.asarray(adapter[ours].astype(dtype))):
                name = f"base_model.model.{module.format(layer=layer)}.{theirs}.weight"
                tensors[name] = np.ascontiguousarray(matrix.T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(folder) as partial:
        write_json(partial / "adapter_config.json", described)
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        _save(tensors, partial / "adapter_model.safetensors")


@contextmanager
def new_folder(folder: Path, field: str = "--to") -> Iterator[Path]:
    """A folder to write into that takes the name `folder` at the end, if nothing was raised.

    Raises UserError, naming the `field` that said so, where `folder` exists or cannot be made.
    """
    check_new(folder, field)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{field}: cannot write {folder}: {error.strerror}") from error
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path, field: str = "--to") -> None:
    """Raises UserError, naming the `field`, where no new folder can take this name."""
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"{field}: {error.strerror}; name another folder") from error
    if exists:
        raise UserError(f"{field}: {folder} exists; name a new folder")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as a file that people read too."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def check_tensors(folder: Path, arch: Architecture) -> TensorFiles:
    """The tensors of a folder, of which only names, shapes and types are read.

    Raises one UserError that lists all missing, extra and misshapen ones.
    """
    files = TensorFiles(folder)
    found, wanted = files.shapes(), stored_shapes(arch)
    extra = {name for name in set(found) - set(wanted) if not COMPUTED.search(name)}
    if arch.tied_embeddings and found.get(HEAD) == wanted[EMBEDDING]:
        extra.discard(HEAD)  # some exporters write the embedding twice
    problems = [f"missing {name} {wanted[name]}" for name in sorted(set(wanted) - set(found))]
    problems += [f"unknown {name} {found[name]}" for name in sorted(extra)]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(f"model.path: {folder} does not fit its config: {'; '.join(problems)}")
    for name in wanted:
        files.dtype(name)
    return files


def stored_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk of all tensors of a model."""
    found, names = {}, tensor_names(arch)
    for path, shape in jax.tree.leaves_with_path(abstract_params(arch)):
        tensor = names[_name(path)]
        layered = "{layer}" in tensor.name
        own = shape.shape[1:] if layered else shape.shape
        for layer in range(arch.layers if layered else 1):
            found[tensor.name.format(layer=layer)] = own[::-1] if tensor.transposed else own
    return found


def _check_tied(files: TensorFiles, arch: Architecture) -> None:
    """Raises UserError where embedding and head are said to be one and are not."""
    if not arch.tied_embeddings or HEAD not in files.shapes():
        return
    rows, width = files.shapes()[HEAD]
    step = max(1, AHEAD_BYTES // (8 * width))
    for first in range(0, rows, step):
        index = (slice(first, min(first + step, rows)), slice(None))
        shape = (index[0].stop - first, width)
        head, embedding = np.empty(shape, np.float32), np.empty(shape, np.float32)
        files.read(HEAD, index, head)
        files.read(EMBEDDING, index, embedding)
        if not np.array_equal(head, embedding):
            raise UserError(
                f"model.path: {files.folder}: {HEAD} differs from {EMBEDDING}, which {CONFIG} ties "
                "it to; set tie_word_embeddings to false there to use it"
            )


def _tensors(params: Any, arch: Architecture, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor as it is on disk; one parameter at a time is in host memory."""
    names = tensor_names(arch)
    for path, value in jax.tree.leaves_with_path(params):
        tensor, host = names[_name(path)], np.asarray(jnp.asarray(value).astype(dtype))
        layered = "{layer}" in tensor.name
        for layer, own in enumerate(host if layered else [host]):
            # safetensors writes the memory as it lies: a transposed view would come out wrong.
            own = np.ascontiguousarray(own.T if tensor.transposed else own)
            yield tensor.name.format(layer=layer), own


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
