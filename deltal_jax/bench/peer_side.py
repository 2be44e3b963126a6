"""What the peers' scripts share. They run in environments of their own, where no deltal_jax is, and
import what lies beside them.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any


def serve(make: Callable[[], Callable[[int], dict[str, Any]]]) -> None:
    """Answer each line of standard input, a seed, by one line of JSON: what `make()` says of it.
    Whatever the peer prints goes to standard error."""
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        answer = make()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(int(line))
        print(json.dumps(found), flush=True)


def tunix_config() -> Any:
    """The model of the load, as Tunix describes it."""
    import jax.numpy as jnp
    import workload
    from tunix.models.qwen3 import model as qwen3

    sizes = workload.SIZES
    return qwen3.ModelConfig(
        num_layers=sizes["layers"],
        vocab_size=sizes["vocab"],
        embed_dim=sizes["d_model"],
        hidden_dim=sizes["d_ff"],
        num_heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["kv_heads"],
        rope_theta=int(sizes["rope_theta"]),
        norm_eps=sizes["norm_epsilon"],
        use_tied_embedding=sizes["tied_embeddings"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
