"""Write the newest checkpoint of a run as a Hugging Face folder: safetensors, config, tokenizer."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a folder that is made anew")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Export; the exit code."""
    from deltal_jax.model.huggingface import export
    from deltal_jax.model.transformer import parameter_count
    from deltal_jax.training.trained import load_trained

    trained = load_trained(Path(arguments.run), {})
    setup, folder = trained.setup, Path(arguments.to)
    tokenizer = setup.tokenizer
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    files = {"generation_config.json": (json.dumps(generation, indent=2) + "\n").encode()}
    files |= tokenizer.files()
    export(folder, trained.params, setup.architecture, files=files, dtype=arguments.dtype)
    figures = {
        "folder": str(folder),
        "parameters": parameter_count(setup.architecture),
        "dtype": arguments.dtype,
        "step": trained.position.step,
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print("{folder}: {parameters:,} parameters in {dtype}, step {step}".format(**figures))
    return 0
