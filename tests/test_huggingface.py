"""Checkpoint folders: what is read and where it lands, what is refused, what is written.

    python -m tests.test_huggingface

prints the peak of anonymous memory of two processes that load a random checkpoint of 300 MB.
"""

import json
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deltal_jax.errors import UserError
from deltal_jax.model import huggingface, tensor_files
from deltal_jax.model.huggingface import (
    export,
    load_architecture,
    load_params,
    read_config,
)
from deltal_jax.model.tensor_files import TensorFiles
from deltal_jax.model.transformer import abstract_params
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.parallel.sharding import parameter_shardings
from tests import fakes
from tests.processes import run_processes

NAMES = pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "llama", "gemma3"])


def loaded(folder, **options):
    return load_params(folder, load_architecture(folder), **options)


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def llama(tmp_path) -> Path:
    return fakes.write_checkpoint(tmp_path / "llama", fakes.CONFIGS["llama"])


def changed(folder: Path, change) -> Path:
    """The folder with its tensors changed by a function on the dict of them."""
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each slice that is read from now on."""
    sizes: list[int] = []
    read = TensorFiles.read

    def counting(self, name, index, into):
        sizes.append(into.size * self.dtype(name).itemsize)
        read(self, name, index, into)

    patch.setattr(TensorFiles, "read", counting)
    return sizes


def held(params, once: bool) -> int:
    """Bytes of the parts that this process holds; `once`: equal parts count once."""
    total = 0
    for x in jax.tree.leaves(params):
        parts = [(str(shard.index), shard.data.nbytes) for shard in x.addressable_shards]
        total += sum(size for _, size in (set(parts) if once else parts))
    return total


@NAMES
def test_a_matrix_is_stored_transposed_and_layer_by_layer(name, tmp_path):
    config = fakes.CONFIGS[name]
    tensors = fakes.checkpoint_tensors(config)
    params = loaded(fakes.write_checkpoint(tmp_path / name, config))
    np.testing.assert_array_equal(
        params["embed"]["embedding"], tensors["model.embed_tokens.weight"]
    )
    for layer in range(config["num_hidden_layers"]):
        block = params["blocks"]
        for ours, theirs in (
            (block["attention"]["k"]["kernel"], "self_attn.k_proj.weight"),
            (block["mlp"]["down"]["kernel"], "mlp.down_proj.weight"),
            (block["attention_norm"]["scale"], "input_layernorm.weight"),
        ):
            want = tensors[f"model.layers.{layer}.{theirs}"].T
            np.testing.assert_array_equal(ours[layer], want)
    assert ("head" in params) == (not config["tie_word_embeddings"])


@NAMES
def test_on_a_mesh_the_values_are_the_same_and_each_device_reads_its_part(
    name, tmp_path, monkeypatch
):
    folder = fakes.write_checkpoint(tmp_path / name, fakes.CONFIGS[name])
    whole = loaded(folder)
    mesh = make_mesh(2, 2, 2)
    sizes = counted(monkeypatch)
    params = loaded(folder, mesh=mesh)
    shardings = parameter_shardings(mesh, abstract_params(load_architecture(folder)))
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert sum(sizes) == held(params, once=True) == held(whole, once=True)
    split = params["blocks"]["mlp"]["gate"]["kernel"].addressable_shards[0].data
    assert split.nbytes * 4 == whole["blocks"]["mlp"]["gate"]["kernel"].nbytes
    # The copies on the data axis come from one read and are still buffers of their own.
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled, whole)


def test_what_is_read_ahead_is_bounded(llama, monkeypatch):
    """Parameters on their way to a device, in bytes, unless one alone is larger."""
    under_way, most = [0], [0]
    start, array = huggingface._Reading.start, huggingface._Reading.array

    def starting(self, *arguments):
        under_way[0] += self.bytes
        most[0] = max(most[0], under_way[0])
        start(self, *arguments)

    def ending(self):
        found = array(self)
        under_way[0] -= self.bytes
        return found

    monkeypatch.setattr(huggingface._Reading, "start", starting)
    monkeypatch.setattr(huggingface._Reading, "array", ending)
    largest = max(x.nbytes for x in jax.tree.leaves(loaded(llama)))
    assert most[0] == sum(x.nbytes for x in jax.tree.leaves(loaded(llama)))
    for bound in (1, 2 * largest):
        monkeypatch.setattr(huggingface, "_ahead", lambda sharding, bound=bound: bound)
        most[0] = 0
        loaded(llama)
        assert largest <= most[0] <= max(bound, largest)


def test_a_reader_that_fails_is_heard(llama, monkeypatch):
    """A file that ends between the check and the read, as one that is still being copied."""
    header = tensor_files._header

    def shortening(path):
        found = header(path)
        path.write_bytes(path.read_bytes()[:-100])
        return found

    monkeypatch.setattr(tensor_files, "_header", shortening)
    message = refusal(lambda: loaded(llama))
    assert message == f"model.path: {llama}/model.safetensors ended while it was read"


def test_a_type_that_is_not_a_number_of_ours_is_refused_by_its_name(llama):
    def change(tensors):
        tensors["model.norm.weight"] = np.zeros(32, np.int8)

    message = refusal(lambda: loaded(changed(llama, change)))
    assert message == (
        f"model.path: {llama}/model.safetensors: model.norm.weight is of type I8; "
        "supported are F64, F32, F16, BF16"
    )


def load_half(folder: str, dtype: str = "float32") -> dict:
    """What a process of two holds of a checkpoint that is split over both."""
    path = Path(folder)
    mesh = make_mesh(1, 2, 1)
    arch = load_architecture(path)
    sizes = counted(pytest.MonkeyPatch())
    before = anonymous_memory()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = jax.block_until_ready(load_params(path, arch, mesh=mesh, dtype=dtype))
    done.set()
    watcher.join()
    sums = [
        float(np.sum(np.asarray(shard.data, np.float64) ** 2))
        for x in jax.tree.leaves(params)
        for shard in x.addressable_shards
        if not x.sharding.is_fully_replicated
    ]
    return {
        "read": sum(sizes),
        "held": held(params, once=False),
        "peak": peak[0] - before,
        "squares": sum(sums),
    }


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind: mapped pages of a checkpoint don't
    count."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def test_each_of_two_processes_reads_and_holds_its_half(tmp_path):
    config = fakes.CONFIGS["qwen2-window"]
    folder = fakes.write_checkpoint(tmp_path / "model", config)
    found = run_processes("tests.test_huggingface:load_half", folder=str(folder))
    tensors = fakes.checkpoint_tensors(config)
    matrices = sum(x.nbytes for x in tensors.values() if x.ndim == 2)
    # Norms and the biases of queries, keys and values are not split by fsdp.
    vectors = sum(x.nbytes for x in tensors.values() if x.ndim == 1)
    for result in found:
        assert result["read"] == result["held"] == matrices // 2 + vectors
    squares = sum(float(np.sum(x.astype(np.float64) ** 2)) for x in tensors.values() if x.ndim == 2)
    assert sum(result["squares"] for result in found) == pytest.approx(squares, rel=1e-9)
    assert found[0]["squares"] != found[1]["squares"]


def test_missing_extra_and_misshapen_tensors_are_listed_in_one_error(llama):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((32, 16), np.float32)

    assert refusal(lambda: loaded(changed(llama, change))) == (
        f"model.path: {llama} does not fit its config: "
        "missing lm_head.weight (48, 32); "
        "missing model.layers.1.mlp.up_proj.weight (40, 32); "
        "unknown model.layers.0.self_attn.q_norm.weight (8,); "
        "model.layers.2.self_attn.k_proj.weight has shape (32, 16), expected (16, 32); "
        "model.norm.weight has shape (7,), expected (32,)"
    )


def test_rotary_tables_and_a_head_written_twice_are_no_news(tmp_path):
    folder = fakes.write_checkpoint(tmp_path / "tied", fakes.CONFIGS["qwen2"])
    before = loaded(folder)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    jax.tree.map(np.testing.assert_array_equal, loaded(changed(folder, change)), before)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    config = fakes.CONFIGS["qwen2"]
    tensors = fakes.checkpoint_tensors(config)
    for change, said in (
        (lambda head: head, None),
        (lambda head: head + (np.arange(head.size) == 77).reshape(head.shape), "differs from"),
        (lambda head: head[:5], r"unknown lm_head\.weight"),
    ):
        head = change(tensors["model.embed_tokens.weight"]).astype(np.float32)
        folder = fakes.write_checkpoint(tmp_path, config, tensors | {"lm_head.weight": head})
        if said is None:
            loaded(folder)
        else:
            with pytest.raises(UserError, match=said):
                loaded(folder)


def test_a_folder_without_a_config_or_without_weights_is_refused_in_one_line(llama):
    (llama / "model.safetensors").rename(llama / "weights.bin")
    message = refusal(lambda: loaded(llama))
    assert message == (
        f"model.path: {llama} has neither model.safetensors nor model.safetensors.index.json"
    )
    (llama / "config.json").unlink()
    assert refusal(lambda: read_config(llama)) == f"model.path: {llama} has no config.json"


@pytest.mark.parametrize("broken", ["{", "", "[1]", "\ud800"])
def test_a_broken_config_is_refused_in_one_line_that_names_it(llama, broken):
    (llama / "config.json").write_bytes(broken.encode("utf-8", "surrogatepass"))
    assert refusal(lambda: read_config(llama)).startswith(f"model.path: {llama}/config.json ")


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_refused_in_one_line_that_names_it(llama, broken):
    path = llama / "model.safetensors.index.json"
    path.write_text(broken)
    assert refusal(lambda: loaded(llama)).startswith(f"model.path: {path} ")


@pytest.mark.parametrize("kept", [0, 5, 400, -100])
def test_a_broken_safetensors_file_is_refused_in_one_line_that_names_it(llama, kept):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(lambda: loaded(llama)).startswith(f"model.path: {path} cannot be read: ")


def test_a_shard_that_is_not_there_is_refused_by_its_name(llama):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(lambda: loaded(llama))
    assert message.startswith(f"model.path: {llama}/model-00001-of-00002.safetensors cannot be ")


def test_dtypes_are_cast_once_to_the_nearest_number(llama, tmp_path):
    exact = loaded(llama)
    low = loaded(llama, dtype=jnp.bfloat16)
    for x, y in zip(jax.tree.leaves(low), jax.tree.leaves(exact), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, np.asarray(y).astype(ml_dtypes.bfloat16))
    arch = load_architecture(llama)
    export(tmp_path / "low", exact, arch, config=read_config(llama), dtype=jnp.bfloat16)
    assert {x.dtype for x in load_file(tmp_path / "low" / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    wide = loaded(tmp_path / "low")
    for x, y in zip(jax.tree.leaves(wide), jax.tree.leaves(low), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, np.asarray(y, np.float32))


@pytest.mark.parametrize("on_mesh", [False, True], ids=["device", "mesh"])
@NAMES
def test_what_is_exported_is_what_was_loaded_bit_for_bit(name, on_mesh, tmp_path, monkeypatch):
    config = fakes.CONFIGS[name]
    folder = fakes.write_checkpoint(tmp_path / "in", config)
    params = loaded(folder, mesh=make_mesh(2, 2, 2) if on_mesh else None)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 12_000)
    arch = load_architecture(folder)
    target = tmp_path / "deep" / "out"
    export(target, params, arch, config=config, files={"tokenizer.json": b"{}"}, dtype=jnp.float32)
    want = fakes.checkpoint_tensors(config)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(target.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in want.values())}
    assert index["weight_map"].keys() == want.keys()
    for path in shards:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            names = set(file.keys())
        tensors = load_file(path)
        assert names == {name for name, home in index["weight_map"].items() if home == path.name}
        assert len(names) == 1 or sum(x.nbytes for x in tensors.values()) <= 12_000
        for tensor_name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, want[tensor_name])
    assert json.loads((target / "config.json").read_text()) == config | {"dtype": "float32"}
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        *(path.name for path in shards),
    }
    jax.tree.map(np.testing.assert_array_equal, loaded(target), params)


def test_no_more_than_one_shard_is_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    """A shard is written before the next is begun."""
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 12_000)
    written: list[int] = []
    tensors, save = huggingface._tensors, huggingface.save_file
    open_bytes = [0]

    def watched(*arguments):
        for name, tensor in tensors(*arguments):
            open_bytes[0] += tensor.nbytes
            yield name, tensor

    def saved(shard, *arguments, **options):
        written.append(open_bytes[0] - sum(written))
        save(shard, *arguments, **options)

    monkeypatch.setattr(huggingface, "_tensors", watched)
    monkeypatch.setattr(huggingface, "save_file", saved)
    arch = load_architecture(llama)
    export(tmp_path / "out", loaded(llama), arch, dtype=jnp.float32, config=read_config(llama))
    largest = max(x.nbytes for x in fakes.checkpoint_tensors(fakes.CONFIGS["llama"]).values())
    assert len(written) > 2
    assert max(written) <= 12_000 + largest


def test_an_export_that_fails_midway_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 12_000)
    calls, save = [], huggingface.save_file

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(huggingface, "save_file", failing)
    params, arch = loaded(llama), load_architecture(llama)
    with pytest.raises(OSError, match="no space"):
        export(tmp_path / "to" / "out", params, arch, config=read_config(llama))
    assert list((tmp_path / "to").iterdir()) == []
    monkeypatch.setattr(huggingface, "save_file", save)
    export(tmp_path / "to" / "out", params, arch, config=read_config(llama))
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["out"]


def test_an_export_never_writes_over_what_is_there(llama):
    before = {path: path.read_bytes() for path in llama.iterdir()}
    message = refusal(lambda: export(llama, loaded(llama), load_architecture(llama)))
    assert message == f"--to: {llama} exists; name a new folder"
    assert {path: path.read_bytes() for path in llama.iterdir()} == before


def load_in_halves(folder: Path, stored: str, dtype: str, **sizes: int) -> tuple[int, list]:
    """Bytes of a random checkpoint, and what each of two processes that loaded it says."""
    config = fakes.CONFIGS["qwen2-window"] | sizes
    config |= {"use_sliding_window": False, "layer_types": None}
    drawn = np.random.default_rng(0).standard_normal(10**6, np.float32).astype(stored)
    tensors = {name: np.resize(drawn, shape) for name, shape in fakes.tensor_shapes(config).items()}
    fakes.write_checkpoint(folder, config, tensors)
    target = "tests.test_huggingface:load_half"
    found = run_processes(target, folder=str(folder), dtype=dtype)
    return (folder / "model.safetensors").stat().st_size, found


def test_no_process_holds_the_whole_model(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    size, found = load_in_halves(tmp_path, "float32", "float32", **sizes)
    assert size > 80e6
    for result in found:
        assert result["held"] == pytest.approx(size / 2, rel=0.01)
        assert result["held"] < result["peak"] < 0.85 * size


def measure(stored: str, dtype: str) -> None:
    """Print what each of two processes holds at most while it loads 300 MB or 600 MB."""
    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816}
    sizes |= {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4}
    with tempfile.TemporaryDirectory() as name:
        size, found = load_in_halves(Path(name), stored, dtype, **sizes)
    print(f"{stored} checkpoint of {size / 1e6:.0f} MB, loaded as {dtype}")
    for process, result in enumerate(found):
        parts = (f"{key} {float(result[key]) / 1e6:.0f} MB" for key in ("read", "held", "peak"))
        print(f"  process {process}: {', '.join(parts)}")


if __name__ == "__main__":
    measure("bfloat16", "bfloat16")
    measure("bfloat16", "float32")
    measure("float32", "float32")
