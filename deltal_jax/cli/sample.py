"""Ask a trained model one problem: its trace as it is drawn, and the verdict."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "problem",
        nargs="?",
        metavar="PROBLEM",
        help="such as '7 1 5 -> 40'; default: a held-out one",
    )
    parser.add_argument("--seed", type=int, default=0, help="another number, another response")
    parser.add_argument("--temperature", type=float, default=None, help="default: the evaluation's")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Sample; the exit code."""
    import jax

    from deltal_jax.data.prompts import encode_prompts
    from deltal_jax.errors import UserError
    from deltal_jax.training.setup import make_engine
    from deltal_jax.training.trained import check_seed, load_trained

    check_seed(arguments.seed)
    trained = load_trained(Path(arguments.run), {})
    setup, config = trained.setup, trained.setup.config
    if arguments.problem is None:
        problem = setup.task.held_out(arguments.seed % 512 + 1)[-1]
    else:
        problem = setup.task.parse_problem(arguments.problem)
    temperature = arguments.temperature
    temperature = config.evaluate.temperature if temperature is None else temperature
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature: must be at least 0 and finite, got {temperature}")
    engine = make_engine(setup, temperature=temperature)
    prompts = encode_prompts([problem], setup.tokenizer, config.rollout.max_prompt_length)
    if not arguments.json:
        print(problem.prompt, end="", flush=True)
    ids: list[int] = []

    def response() -> Iterator[int]:
        for token in engine.stream(trained.params, prompts, jax.random.key(arguments.seed)):
            if token in setup.tokenizer.eos_ids:
                return
            ids.append(token)
            yield token

    text = ""
    for part in setup.tokenizer.stream(response()):
        if not arguments.json:
            print((" " if not text else "") + part, end="", flush=True)
        text += part
    truncated = len(ids) == config.rollout.max_response_length
    verdict = setup.task.verify(text, problem.answer)
    if arguments.json:
        found = {"prompt": problem.prompt, "response": text, "reward": verdict.reward}
        judged = {"correct": verdict.correct, "reason": verdict.reason, "truncated": truncated}
        print(json.dumps(found | judged | {"tokens": len(ids)}, ensure_ascii=False))
    else:
        end = ", cut off at the length limit" if truncated else ""
        print(f"\n→ {verdict.reason} ({len(ids)} tokens{end})")
        sys.stdout.flush()
    return 0
