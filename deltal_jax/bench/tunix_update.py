"""The peer's side of `deltal bench update`: Tunix's GRPO step on the same batches.

Runs in an environment of its own, where `google-tunix==0.1.7` is installed, and imports nothing of
ours but the load. For each line on standard input, the seed of a batch, it does one update on the
padded batch and answers one line of JSON: wall and CPU seconds.
"""

import time

from peer_side import serve, tunix_config  # beside this file: no deltal_jax is installed here


def make_step():
    """A function that does the update on the batch of a seed and returns its seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import workload  # beside this file: the peer's environment has no deltal_jax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import common, function_registry, trainer
    from tunix.rl.grpo import grpo_learner
    from tunix.sft import peft_trainer

    model = qwen3.Qwen3(tunix_config(), rngs=nnx.Rngs(0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # On the mesh from the start, or the step compiles twice.
    nnx.update(model, jax.device_put(nnx.state(model), replicated))
    grpo = grpo_learner.GRPOConfig(
        num_generations=workload.GROUP,
        beta=0.0,
        epsilon=workload.CLIP_LOW,
        loss_agg_mode="token-mean",
        loss_algo="grpo",
    )
    grpo.epsilon_high, grpo.temperature = workload.CLIP_HIGH, 1.0
    loss = function_registry.get_policy_loss_fn("grpo")
    optimizer = optax.adamw(workload.LEARNING_RATE, weight_decay=0.0)
    training = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    learner = trainer.Trainer(model, optimizer, training, custom_checkpoint_metadata_fn=dict)
    learner.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=grpo, pad_id=0, eos_id=workload.EOS
        ),
        has_aux=True,
    )
    learner.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": grpo})
    with mesh:
        update, _ = learner.jit_train_and_eval_step(False, True)

    def step(seed: int) -> dict[str, float]:
        batch = workload.batch_arrays(seed)
        prompt, real = workload.PROMPT, batch["loss_mask"][:, workload.PROMPT :]
        tokens, logprobs = batch["tokens"], batch["logprobs"]
        example = common.TrainExample(
            prompt_ids=jnp.asarray(tokens[:, :prompt]),
            prompt_mask=jnp.ones((workload.RESPONSES, prompt), jnp.int32),
            completion_ids=jnp.asarray(tokens[:, prompt:]),
            completion_mask=jnp.asarray(real.astype(np.int32)),
            advantages=jnp.asarray(batch["advantages"]),
            ref_per_token_logps=None,
            old_per_token_logps=jnp.asarray(logprobs[:, prompt:]),
        )
        cpu, wall = time.process_time(), time.perf_counter()
        with mesh:
            jax.block_until_ready(update(example))
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    return step


if __name__ == "__main__":
    serve(make_step)
