"""The peer's side of `deltal bench rollout`: transformers' `generate` on the same prompts and model
shape.

Runs where torch and transformers are installed and imports nothing of ours but the load; the
protocol is that of tunix_sampler.py.
"""

import time

from peer_side import serve  # beside this file


def make_sampler():
    """A function that samples the load of a seed and says how long it took."""
    import torch
    import transformers
    import workload  # beside this file

    sizes = workload.SIZES
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab"],
        num_hidden_layers=sizes["layers"],
        hidden_size=sizes["d_model"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["d_ff"],
        tie_word_embeddings=sizes["tied_embeddings"],
        rms_norm_eps=sizes["norm_epsilon"],
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).float().eval()

    def run(seed: int, ends: list[int]) -> dict[str, float]:
        torch.manual_seed(seed)
        prompts = torch.tensor(workload.prompt_tokens(seed)).long()
        options = transformers.GenerationConfig(
            max_new_tokens=workload.LIMIT,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=ends or [sizes["vocab"] + 7],  # None would mean the model's own
        )
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=options
            )
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        new = out[:, workload.PROMPT :]
        real = (new != 0).sum() if ends else new.numel()
        return seconds | {"tokens": int(real)}

    def sample(seed: int) -> dict[str, object]:
        return {**run(seed, list(workload.ENDS)), "full": run(seed, [])}

    return sample


if __name__ == "__main__":
    serve(make_sampler)
