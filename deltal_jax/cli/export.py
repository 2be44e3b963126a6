"""Write the newest checkpoint of a run as a Hugging Face folder: safetensors, config, tokenizer."""

import argparse
import json
from pathlib import Path
from typing import Any

from deltal_jax.cli.options import add_base, moved_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a folder that is made anew")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="type of the weights; default: bfloat16, of adapters float32",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a run with adapters: a whole model, not the adapters in PEFT's format",
    )
    add_base(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Export; the exit code."""
    import dataclasses

    import jax

    from deltal_jax.errors import UserError
    from deltal_jax.model import huggingface
    from deltal_jax.model.lora import merge_adapters, trained
    from deltal_jax.training.trained import load_trained

    folder = Path(arguments.to)
    huggingface.check_new(folder)
    source = load_trained(Path(arguments.run), moved_base(arguments.base))
    setup, params = source.setup, source.params
    arch, lora, tokenizer = setup.architecture, setup.architecture.lora, setup.tokenizer
    if arguments.merge and lora is None:
        raise UserError(f"--merge: {arguments.run} has no adapters; leave it out")
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    files = {"generation_config.json": (json.dumps(generation, indent=2) + "\n").encode()}
    files |= tokenizer.files()
    adapters = lora is not None and not arguments.merge
    dtype = arguments.dtype or ("float32" if adapters else "bfloat16")
    options: dict[str, Any] = {"files": files, "dtype": dtype}
    if adapters:
        base = str(setup.config.model.path)
        huggingface.export_adapters(
            folder, params, arch, base=base, revision=setup.config.model.revision, **options
        )
        written = trained(params)
    else:
        written = params if lora is None else merge_adapters(params, lora, dtype)
        arch = dataclasses.replace(arch, lora=None)
        huggingface.export(folder, written, arch, config=setup.checkpoint_config, **options)
    figures = {
        "folder": str(folder),
        "parameters": sum(x.size for x in jax.tree.leaves(written)),
        "dtype": dtype,
        "step": source.position.step,
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print("{folder}: {parameters:,} parameters in {dtype}, step {step}".format(**figures))
    return 0
