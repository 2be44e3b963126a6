"""From a config to the parts of a run: task, tokenizer, model definition, parameters, engines."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from deltal_jax.config import Config, OptimizerConfig
from deltal_jax.data.prompts import Drawn, draw_prompts, encode_prompts, train_tokenizer
from deltal_jax.data.tokenizer import Tokenizer, read_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.model import huggingface
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.families import architecture_of
from deltal_jax.model.hub import find_checkpoint, pinned
from deltal_jax.model.kernels import OWN, PACKS, Kernel, check_kernel, default_attention
from deltal_jax.model.lora import LoRA, merge_adapters, overlay, trained
from deltal_jax.model.remat import check_pinned_host
from deltal_jax.model.tensor_files import fingerprint, read_object
from deltal_jax.model.transformer import (
    abstract_params,
    init_model,
    make_graphdef,
    split_model,
)
from deltal_jax.parallel.sharding import parameter_shardings
from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.rollout.checks import check_memory, free_memory
from deltal_jax.rollout.engine import Engine
from deltal_jax.rollout.http import HttpEngine
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.rollout.stream import Streamer
from deltal_jax.tasks.base import Problem, Task
from deltal_jax.tasks.catalog import make_task
from deltal_jax.tasks.files import load_rewards
from deltal_jax.training.describe import sampling_parts
from deltal_jax.training.devices import (
    choose_training_mesh,
    make_sampling_mesh,
    make_training_mesh,
)
from deltal_jax.training.loss import SUPERVISED
from deltal_jax.training.objective import loss_config, make_loss
from deltal_jax.training.optimizer import make_optimizer, optimizer_meter
from deltal_jax.training.step import Update
from deltal_jax.types import Prompts

#: Beside a run's tokenizer, where it has adapters.
BASE = "base.json"
#: In a run's folder, unless the config names another: weights for a server that samples.
SERVED = "served"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays fixed during a run."""

    config: Config
    task: Task
    tokenizer: Tokenizer
    architecture: Architecture
    graphdef: nnx.GraphDef
    #: `config.json` of the checkpoint that the model comes from; None: a new model.
    checkpoint_config: dict[str, Any] | None
    #: Of the weights beside the adapters of a run that is reopened: see `tensor_files.fingerprint`.
    base_fingerprint: dict[str, str] | None = None
    #: The devices that train, and those that sample where there are no others; None: one device.
    mesh: Mesh | None = None
    #: Why its sizes are what they are, where `mesh.auto` chose them.
    chosen: str | None = None


def pin_checkpoint(config: Config) -> Config:
    """The config with `model.path` and `model.revision` such that they mean the same for ever."""
    model = config.model
    if model.path is None:
        return config
    path, revision = pinned(model.path, model.revision)
    return dataclasses.replace(
        config, model=dataclasses.replace(model, path=path, revision=revision)
    )


def make_setup(config: Config, saved: Path | None = None) -> Setup:
    """The parts that a config names. The tokenizer and the shape of the model come from the folder
    `saved` that `save_model_files` made, from that of `model.path`, or are made anew."""
    mesh, chosen = None if config.mesh.auto else make_training_mesh(config), None
    task = make_task(config.task)
    checkpoint_config = None
    folder = saved
    if config.model.path is not None:
        folder = saved or find_checkpoint(config.model.path, config.model.revision)
        checkpoint_config = huggingface.read_config(folder)
    if folder is None:
        tokenizer: Tokenizer = train_tokenizer(task)
    else:
        tokenizer = read_tokenizer(folder)
    architecture = make_architecture(config, tokenizer.vocab_size, checkpoint_config)
    if config.mesh.auto:
        config, mesh, chosen = choose_training_mesh(config, architecture)
    graphdef = make_graphdef(architecture)
    kept = None
    if saved is not None and architecture.lora is not None:
        kept = read_object(saved / BASE)
    rest = checkpoint_config, kept, mesh, chosen
    return Setup(config, task, tokenizer, architecture, graphdef, *rest)


def save_model_files(setup: Setup, folder: Path) -> None:
    """Write what `make_setup` reads, so that a run depends on no other folder: the tokenizer's
    files, `config.json`, and of a model beside adapters the fingerprint."""
    with huggingface.new_folder(folder, "run.dir") as partial:
        for name, content in setup.tokenizer.files().items():
            (partial / name).write_bytes(content)
        if setup.checkpoint_config is not None:
            huggingface.write_json(partial / huggingface.CONFIG, setup.checkpoint_config)
        if setup.architecture.lora is not None:
            huggingface.write_json(partial / BASE, fingerprint(find_base(setup)))


def check_setup(setup: Setup, *, weights: bool = True, memory: bool = True) -> None:
    """Raises UserError for what only the parts can tell: no held-out problem, too long a prompt or
    response, an option that the surrogate does not take, rewards that cannot be loaded, weights
    that do not fit, too little memory."""
    config = setup.config
    check_config(config, setup.checkpoint_config)
    if config.model.path is not None and weights:
        base = dataclasses.replace(setup.architecture, lora=None)
        huggingface.check_tensors(find_base(setup), base)
    rollout = config.rollout
    if memory and rollout.engine == "jax":  # before a warm-up, not after it
        sampling = make_sampling_mesh(config) or setup.mesh
        parts = sampling_parts(config, setup.architecture, setup.mesh)
        check_memory(rollout.slots, parts, free_memory(sampling and sampling.local_devices))
    if memory:
        _check_offload(setup)
    encode_problems(setup, setup.task.held_out(config.evaluate.problems))
    draw_training(setup, 0, 1)


def _check_offload(setup: Setup) -> None:
    """Raises UserError where the devices do not reach the memory that something is to lie in."""
    config = setup.config
    device = jax.local_devices()[0] if setup.mesh is None else setup.mesh.local_devices[0]
    if config.model.remat == "offload":
        check_pinned_host("model.remat", device, "layer")
    for phase, options in (("sft", config.sft.optimizer), ("rl", config.rl.optimizer)):
        if options.offload and setup.mesh is not None and device.platform == "cpu":
            # Devices that wait for each other, and for copies, can wait for ever.
            raise UserError(f"{phase}.optimizer.offload: not on a mesh of CPUs; set it to false")
        if options.offload:
            check_pinned_host(f"{phase}.optimizer.offload", device, "false")


def check_config(config: Config, checkpoint_config: dict[str, Any] | None) -> None:
    """The part of `check_setup` that needs no problem, no weights and no device."""
    make_loss(config)
    load_rewards(config.task.rewards)
    check_context(config, checkpoint_config)


def check_context(config: Config, checkpoint_config: dict[str, Any] | None) -> None:
    """Raises UserError for prompts with responses that are longer than the model was made for."""
    context = (checkpoint_config or {}).get(huggingface.CONTEXT)
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    if context is not None and longest > context:
        raise UserError(
            f"rollout.max_response_length: with the prompt up to {longest} tokens, and the model "
            f"was made for {context} ({huggingface.CONTEXT})"
        )


def encode_problems(setup: Setup, problems: Sequence[Problem]) -> Prompts:
    """Prompts as the config wants them, at positions from 0 on."""
    config = setup.config
    width, chat = config.rollout.max_prompt_length, config.data.chat_template
    return encode_prompts(problems, setup.tokenizer, width, chat=chat)


def draw_training(setup: Setup, start: int, count: int) -> Drawn:
    """The next `count` prompts of the training stream, from a position on."""
    config = setup.config
    return draw_prompts(
        setup.task,
        setup.tokenizer,
        seed=config.seed,
        start=start,
        count=count,
        width=config.rollout.max_prompt_length,
        chat=config.data.chat_template,
        overlong=config.data.overlong_prompts,
    )


def make_architecture(
    config: Config,
    vocab: int,
    checkpoint_config: dict[str, Any] | None = None,
    platform: str | None = None,
) -> Architecture:
    """The model's shape, of the checkpoint if there is one, with how the config computes it on
    `platform`, by default the one here.

    `vocab` is the tokenizer's; raises UserError where the checkpoint has fewer rows.
    """
    model, lora = config.model, config.lora
    if checkpoint_config is None:
        arch = Architecture(
            vocab=vocab,
            layers=model.layers,
            d_model=model.d_model,
            heads=model.heads,
            kv_heads=model.kv_heads or model.heads,
            head_dim=model.head_dim or model.d_model // model.heads,
            d_ff=model.d_ff,
            tied_embeddings=model.tied_embeddings,
            rope_theta=model.rope_theta,
            norm_epsilon=model.norm_epsilon,
        )
    else:
        arch = architecture_of(checkpoint_config)
        huggingface.check_vocabulary(arch, vocab)
    return dataclasses.replace(
        arch,
        remat=model.remat,
        compute_dtype=model.compute_dtype,
        attention=_kernel(config, arch.head_dim, platform or jax.default_backend()),
        lora=LoRA(lora.rank, lora.alpha, lora.targets) if lora.rank else None,
    )


def _kernel(config: Config, head_dim: int, here: str) -> Kernel:
    """The kernel of attention on this platform. Raises UserError where the config names one that
    can't serve it."""
    wanted, dtype, packed = config.model.attention, config.model.compute_dtype, config.rl.pack
    if wanted == "auto":
        return default_attention(here, dtype, head_dim, packed)
    if wanted != "xla" and OWN.get(here) != wanted:
        platform = next(name for name, own in OWN.items() if own == wanted).upper()
        raise UserError(
            f"model.attention: {wanted} needs a {platform}, and JAX runs on {here} here"
        )
    check_kernel(wanted, dtype, head_dim)
    if packed and wanted not in PACKS:
        raise UserError(f"rl.pack: {wanted} takes one response a row; set it to false")
    return wanted


def init_params(setup: Setup, key: jax.Array) -> Any:
    """The parameters that a run starts from: those of `model.path`, or fresh ones, in one compiled
    program that makes them where they lie on the mesh. Adapters are fresh, and what they are beside
    is frozen in bfloat16."""
    config, arch = setup.config, setup.architecture

    def fresh(key: jax.Array) -> Any:
        params = trained(split_model(init_model(arch, key))[1])
        return jax.tree.map(lambda x: x.astype(config.model.param_dtype), params)

    shardings = None
    if setup.mesh is not None:
        shardings = parameter_shardings(setup.mesh, jax.eval_shape(fresh, key))
    make = jax.jit(fresh, out_shardings=shardings)
    if config.model.path is None:
        return make(key)
    params = load_checkpoint(setup)
    return params if arch.lora is None else overlay(params, make(key))


def load_checkpoint(setup: Setup) -> Any:
    """The parameters of `model.path`, without adapters."""
    base = dataclasses.replace(setup.architecture, lora=None)
    frozen = setup.architecture.lora is not None
    dtype = "bfloat16" if frozen else setup.config.model.param_dtype
    dtype = jax.numpy.dtype(dtype)
    return huggingface.load_params(find_base(setup), base, mesh=setup.mesh, dtype=dtype)


def find_base(setup: Setup) -> Path:
    """The folder of `model.path`.

    Raises UserError where that holds another model by now than the run was started from.
    """
    model = setup.config.model
    assert model.path is not None
    folder = find_checkpoint(model.path, model.revision)
    if huggingface.read_config(folder) != setup.checkpoint_config:
        raise UserError(f"model.path: {folder} has another {huggingface.CONFIG} than the run")
    if setup.base_fingerprint not in (None, fingerprint(folder)):
        raise UserError(f"model.path: {folder} has other weights than the run was started from")
    return folder


def abstract_trained(setup: Setup) -> Any:
    """Shapes and types of the parameters that updates change, without allocating them."""
    dtype = setup.config.model.param_dtype
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), trained(abstract_params(setup.architecture))
    )


def make_update(setup: Setup, phase: str) -> Update:
    """The update of the phase "sft" or "rl"; the same object where the config says the same of it,
    so that a second run in this process compiles nothing."""
    return update_of(setup.config, setup.graphdef, setup.mesh, phase)


def update_of(config: Config, graphdef: nnx.GraphDef, mesh: Mesh | None, phase: str) -> Update:
    """The same for a model that need not be here, on devices that need not be either."""
    if phase == "sft":
        options, steps, loss = config.sft.optimizer, config.sft.steps, None
    else:
        options, steps = config.rl.optimizer, config.rl.updates
        loss = loss_config(config)
    if options.schedule == "constant":
        steps = 0  # nothing depends on it
    measured = phase == "rl", config.halves, config.objective.alpha == "mse"
    return _make_update(graphdef, options, steps, loss, mesh, measured)


@functools.lru_cache(maxsize=8)
def _make_update(
    graphdef: nnx.GraphDef,
    options: OptimizerConfig,
    steps: int,
    loss: Config | None,
    mesh: Mesh | None,
    measured: tuple[bool, bool, bool],
) -> Update:
    terms = SUPERVISED if loss is None else make_loss(loss)
    reinforced, halves, remembers = measured
    return Update(
        graphdef,
        make_optimizer(options, steps),
        terms,
        mesh=mesh,
        moment_dtype=options.moment_dtype,
        offload=options.offload,
        halves=reinforced and halves,
        remembers=reinforced and remembers,
        meter=optimizer_meter(options) if reinforced else None,
    )


def make_engine(setup: Setup, *, temperature: float, training: bool = False) -> RolloutEngine:
    """The config's sampler for training and its evaluations; `training` takes the config's top-k,
    top-p and min-p too, and its devices. One in this process is the same object for the same
    options, so that training, evaluation and a second run share what is compiled."""
    config = setup.config
    options = sampling_options(config, setup.tokenizer.eos_ids, temperature, training)
    if config.rollout.engine == "jax":
        mesh = make_sampling_mesh(config) if training else None
        return engine_of(setup.graphdef, options, mesh or setup.mesh)
    server = config.rollout.server
    assert server.url is not None  # by the config's rules
    if server.weights_dir is None and config.run.dir is None:
        raise UserError("rollout.server.weights_dir: name a folder that the server sees")
    if jax.process_count() > 1:
        raise UserError("rollout.engine: http serves one process; use jax on several")
    return HttpEngine(
        server.url,
        server.dialect,
        options,
        setup.architecture,
        functools.partial(_write_served, setup),
        weights_dir=Path(server.weights_dir or f"{config.run.dir}/{SERVED}"),
        timeout=server.timeout,
    )


@functools.lru_cache(maxsize=8)
def engine_of(graphdef: nnx.GraphDef, options: SamplingOptions, mesh: Mesh | None = None) -> Engine:
    """A sampler of this process, the same object for the same arguments."""
    return Engine(graphdef, options, mesh=mesh)


def make_local_engine(setup: Setup, *, temperature: float) -> Engine:
    """A sampler in this process whatever the config says: a server may be in use by a run."""
    options = sampling_options(setup.config, setup.tokenizer.eos_ids, temperature)
    return engine_of(setup.graphdef, options)


def make_streamer(setup: Setup, params: Any, *, temperature: float) -> Streamer:
    """The same for one response at a time, by these parameters."""
    options = sampling_options(setup.config, setup.tokenizer.eos_ids, temperature)
    return Streamer(setup.graphdef, options, params)


def sampling_options(
    config: Config, eos_ids: tuple[int, ...], temperature: float, training: bool = False
) -> SamplingOptions:
    """How the config draws responses; `training` takes its top-k, top-p and min-p too."""
    rollout = config.rollout
    filters: dict[str, Any] = {}
    if training:
        filters = dict(top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)
    return SamplingOptions(
        slots=rollout.slots,
        max_response_length=rollout.max_response_length,
        eos_ids=eos_ids,
        temperature=temperature,
        **filters,
    )


def _write_served(setup: Setup, folder: Path, params: Any) -> None:
    """The folder that a server loads, in the type that our own sampler would compute in."""
    dtype = setup.config.model.compute_dtype
    export_model(setup, folder, params, dtype, "rollout.server.weights_dir")


def exported_files(setup: Setup) -> dict[str, bytes]:
    """What goes beside exported weights: the tokenizer, and the ids that end a response."""
    tokenizer = setup.tokenizer
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    described = (json.dumps(generation, indent=2) + "\n").encode()
    return {"generation_config.json": described} | tokenizer.files()


def export_model(setup: Setup, folder: Path, params: Any, dtype: str, field: str) -> Any:
    """Write a whole model, adapters merged, as a Hugging Face folder; returns its parameters.

    Raises UserError, naming the `field` that said so, where the folder exists or cannot be made.
    """
    lora = setup.architecture.lora
    written = params if lora is None else merge_adapters(params, lora, dtype)
    huggingface.export(
        folder,
        written,
        dataclasses.replace(setup.architecture, lora=None),
        config=setup.checkpoint_config,
        files=exported_files(setup),
        dtype=dtype,
        field=field,
    )
    return written
