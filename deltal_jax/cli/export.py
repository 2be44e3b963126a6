"""Write a checkpoint of a run as a Hugging Face folder: safetensors, config, tokenizer."""

import argparse
import json
from pathlib import Path

from deltal_jax.cli.options import add_base, add_step, moved_base, parse_steps


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
    add_step(parser)
    add_base(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Export; the exit code."""
    import jax

    from deltal_jax.errors import UserError
    from deltal_jax.model import huggingface
    from deltal_jax.model.lora import trained
    from deltal_jax.training.setup import export_model, exported_files
    from deltal_jax.training.trained import load_trained

    folder = Path(arguments.to)
    huggingface.check_new(folder)
    steps = parse_steps(arguments.step, several=False)
    source = load_trained(Path(arguments.run), moved_base(arguments.base), steps)
    setup, params = source.setup, source.params
    lora = setup.architecture.lora
    if arguments.merge and lora is None:
        raise UserError(f"--merge: {arguments.run} has no adapters; leave it out")
    adapters = lora is not None and not arguments.merge
    dtype = arguments.dtype or ("float32" if adapters else "bfloat16")
    if adapters:
        huggingface.export_adapters(
            folder,
            params,
            setup.architecture,
            base=str(setup.config.model.path),
            revision=setup.config.model.revision,
            files=exported_files(setup),
            dtype=dtype,
        )
        written = trained(params)
    else:
        written = export_model(setup, folder, params, dtype, "--to")
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
