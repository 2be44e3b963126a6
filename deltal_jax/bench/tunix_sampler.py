"""The peer's side of `deltal bench rollout`: Tunix's own sampler on the same prompts and model.

Runs in an environment of its own, where `google-tunix==0.1.7` is installed, and imports nothing of
ours but the load. For each line on standard input, the seed of the prompts, it samples twice, up to
the ends of the load and up to the limit, and answers one line of JSON.
"""

import time

from peer_side import serve, tunix_config  # beside this file: no deltal_jax is installed here


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def make_sampler():
    """A function that samples the load of a seed and says how long it took."""
    import workload  # beside this file: the peer's environment has no deltal_jax
    from flax import nnx
    from tunix.generate import sampler as tunix_sampler
    from tunix.models.qwen3 import model as qwen3

    sizes = workload.SIZES
    cache = tunix_sampler.CacheConfig(
        cache_size=workload.PROMPT + workload.LIMIT,
        num_layers=sizes["layers"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
    )
    sampler = tunix_sampler.Sampler(qwen3.Qwen3(tunix_config(), rngs=nnx.Rngs(0)), Numbers(), cache)

    def run(seed: int, ends: list[int]) -> dict[str, float]:
        # It adds BOS itself.
        texts = [" ".join(map(str, row[1:])) for row in workload.prompt_tokens(seed)]
        cpu, wall = time.process_time(), time.perf_counter()
        out = sampler(
            texts,
            seed=seed,
            max_generation_steps=workload.LIMIT,
            max_prompt_length=workload.PROMPT,
            eos_tokens=ends,
            temperature=1.0,
            top_p=1.0,
        )
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return seconds | {"tokens": sum(len(row) for row in out.tokens)}

    def sample(seed: int) -> dict[str, object]:
        ended = run(seed, list(workload.ENDS))
        return {**ended, "full": run(seed, [sizes["vocab"] + 7])}

    return sample


if __name__ == "__main__":
    serve(make_sampler)
