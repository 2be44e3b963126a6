"""Any slice of a tensor on disk, in any type, is what a plain read gives."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltal_jax.model import tensor_files
from deltal_jax.model.tensor_files import TensorFiles


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_slice_of_every_type_is_what_a_plain_read_casts(stored, dtype, tmp_path, monkeypatch):
    """Rows and columns, turned or not, that fill tiles, strips and requests, or do not."""
    monkeypatch.setattr(tensor_files, "REQUEST_BYTES", 4096)
    monkeypatch.setattr(tensor_files, "TILE_BYTES", 2048)
    monkeypatch.setattr(tensor_files, "TURNED_ROWS", 8)
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 9000)
    rng = np.random.default_rng(0)
    tensors = {
        f"{rows}x{columns}": rng.normal(size=(rows, columns)).astype(stored)
        for rows, columns in ((1, 1), (7, 64), (70, 48), (33, 37), (3, 3000), (500, 8))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        for index in (
            (slice(None), slice(None)),
            (slice(rows // 2, rows), slice(None)),
            (slice(0, 1), slice(columns // 2, columns)),
            (slice(rows // 3, rows), slice(columns // 4, columns // 2 + 1)),
        ):
            want = tensor[index].astype(dtype)
            straight, turned = np.zeros_like(want), np.zeros_like(want.T, order="C")
            for into in (straight, turned.T):
                for own, piece in files.pieces(name, index, into):
                    files.read(name, own, piece)
            assert straight.tobytes() == want.tobytes()
            assert turned.tobytes() == want.T.tobytes()


def test_bits_that_are_no_numbers_are_kept(tmp_path):
    """Every pattern of 16 bits, not-a-numbers among them, as bfloat16."""
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    save_file({"x": bits.view(ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    found = np.zeros((256, 256), ml_dtypes.bfloat16)
    TensorFiles(tmp_path).read("x", (slice(None), slice(None)), found.T)
    np.testing.assert_array_equal(found.view(np.uint16), bits.T)
