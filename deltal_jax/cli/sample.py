"""Ask a model: one problem of a trained run with its verdict, plain text, or a conversation."""

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltal_jax.cli.options import add_base, add_step, check_seed, moved_base, parse_steps
from deltal_jax.errors import UserError

if TYPE_CHECKING:
    from deltal_jax.data.conversation import Conversation
    from deltal_jax.rollout.text import Checkpoint, Response, Writer

DTYPES = ("bfloat16", "float32")
MAX_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder")
    parser.add_argument(
        "problem",
        nargs="?",
        metavar="PROBLEM",
        help="such as '7 1 5 -> 40'; default: a held-out one",
    )
    parser.add_argument("--seed", type=int, default=0, help="another number, another response")
    parser.add_argument(
        "--temperature",
        type=float,
        default=None,
        help="0 takes the likeliest token; default: the evaluation's, or of a checkpoint folder "
        "its generation_config.json's or 1",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object (a turn), nothing else"
    )
    add_step(parser)
    add_base(parser)
    text = parser.add_argument_group("text from a checkpoint folder")
    text.add_argument(
        "--model",
        metavar="FOLDER",
        help="config.json, tokenizer and weights, or a hub id, instead of RUN",
    )
    text.add_argument("--revision", help="branch, tag or commit of a hub id")
    text.add_argument(
        "--prompt", metavar="TEXT", help="text to continue; - reads it from standard input"
    )
    text.add_argument(
        "--chat",
        action="store_true",
        help="ask in the model's chat template: --prompt alone, or each line of standard input in "
        "one conversation; /reset starts anew, /exit or its end leaves, Ctrl-C ends a response",
    )
    text.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    text.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"of a response; default: {MAX_TOKENS}"
    )
    text.add_argument(
        "--dtype",
        metavar="|".join(DTYPES),
        help="of weights and computation; default: bfloat16, and float32 may be faster on a CPU",
    )
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Sample; the exit code."""
    _check(arguments)
    return _ask_run(arguments) if arguments.model is None else _ask_model(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other, or out of bounds."""
    if arguments.model is None:
        if arguments.run is None:
            arguments.refuse("the following arguments are required: RUN, or --model FOLDER")
        for name in ("prompt", "chat", "system", "max_tokens", "dtype", "revision"):
            if getattr(arguments, name) not in (None, False):
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option}: needs --model FOLDER, not a run folder")
        return
    if arguments.step is not None:
        raise UserError("--step: only a run has steps; leave it out")
    if arguments.run is not None:
        raise UserError(f"--model: takes no RUN beside it, got {arguments.run!r}; name one of them")
    if arguments.prompt is None and not arguments.chat:
        raise UserError("--model: add --prompt TEXT to continue a text, or --chat for messages")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system: only with --chat")
    if arguments.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: {arguments.dtype!r} is not one of {', '.join(DTYPES)}")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UserError(f"--max-tokens: must be at least 1, got {arguments.max_tokens}")


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature: must be at least 0 and finite, got {temperature}")


def _ask_run(arguments: argparse.Namespace) -> int:
    """One problem of a trained run."""
    import jax

    from deltal_jax.rollout.text import Response
    from deltal_jax.training.setup import encode_problems, make_streamer
    from deltal_jax.training.trained import load_trained

    check_seed(arguments.seed)
    steps = parse_steps(arguments.step, several=False)
    trained = load_trained(Path(arguments.run), moved_base(arguments.base), steps)
    setup, config = trained.setup, trained.setup.config
    if arguments.problem is None:
        problem = setup.task.held_out(arguments.seed % 512 + 1)[-1]
    else:
        problem = setup.task.parse_problem(arguments.problem)
    temperature = arguments.temperature
    temperature = config.evaluate.temperature if temperature is None else temperature
    _check_temperature(temperature)
    streamer = make_streamer(setup, trained.params, temperature=temperature)
    prompts = encode_problems(setup, [problem])
    if not arguments.json:
        print(problem.prompt, end="", flush=True)
    tokens = streamer.stream(prompts, jax.random.key(arguments.seed))
    response, text = Response(tokens, setup.tokenizer), ""
    with _interruptible(response):
        for part in response:
            if not arguments.json:
                print((" " if not text else "") + part, end="", flush=True)
            text += part
    if response.finish == "interrupted":
        raise KeyboardInterrupt
    truncated = response.finish == "length"
    verdict = setup.task.verify(text, problem.answer)
    if arguments.json:
        found = {"prompt": problem.prompt, "response": text, "reward": verdict.reward}
        judged = {"correct": verdict.correct, "reason": verdict.reason, "truncated": truncated}
        print(json.dumps(found | judged | {"tokens": response.count}, ensure_ascii=False))
    else:
        end = ", cut off at the length limit" if truncated else ""
        print(f"\n→ {verdict.reason} ({response.count} tokens{end})")
        sys.stdout.flush()
    return 0


def _ask_model(arguments: argparse.Namespace) -> int:
    """Plain text or a conversation with a checkpoint folder."""
    from deltal_jax.backend import enable_compile_cache
    from deltal_jax.data.conversation import Conversation
    from deltal_jax.model.hub import find_checkpoint
    from deltal_jax.rollout.text import Writer, open_checkpoint

    check_seed(arguments.seed)
    if arguments.temperature is not None:
        _check_temperature(arguments.temperature)
    enable_compile_cache()
    started = time.perf_counter()
    with _own_names():
        checkpoint = open_checkpoint(find_checkpoint(arguments.model, arguments.revision))
    talk = Conversation.start(checkpoint.tokenizer, arguments.system) if arguments.chat else None
    text = None if arguments.prompt is None else _prompt(arguments.prompt)
    ids: Sequence[int] = ()
    if text is not None:  # what is wrong with it is found before the weights are read
        ids = talk.asked(text).ids if talk else checkpoint.tokenizer.encode(text, bos=True)
        checkpoint.check_prompt(ids)
    dtype = arguments.dtype or DTYPES[0]
    with _own_names():
        writer = Writer(
            checkpoint,
            dtype=dtype,
            temperature=arguments.temperature,
            max_tokens=arguments.max_tokens or MAX_TOKENS,
            seed=arguments.seed,
        )
    model = _describe(checkpoint, dtype, time.perf_counter() - started)
    if text is not None:
        response = writer.respond(ids)
        _show(response, text, as_json=arguments.json)
        if response.finish == "interrupted":
            raise KeyboardInterrupt
        responses = [response]
    else:
        assert talk is not None
        responses = _converse(writer, talk, model, as_json=arguments.json)
    print(f"{_speed(responses)}; {model}", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Errors of a checkpoint by the names of the options here."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("model.path", "--model").replace("model.revision", "--revision")
        raise UserError(said) from error


def _prompt(given: str) -> str:
    """The text of --prompt. Of standard input, but for the last end of line, which shells add."""
    try:
        text = sys.stdin.read().removesuffix("\n") if given == "-" else given
        text.encode()
    except UnicodeError:
        raise UserError("--prompt: the text is not valid UTF-8") from None
    return text


def _show(response: "Response", prompt: str, *, as_json: bool) -> None:
    """Print a response as it is drawn, or as JSON at its end."""
    with _interruptible(response):
        for part in response:
            if not as_json:
                print(part, end="", flush=True)
    if as_json:
        count, seconds = response.steady
        found = {"prompt": prompt, "response": response.text, "tokens": response.count}
        found |= {"finish": response.finish, "seconds": round(response.seconds, 3)}
        found |= {"tokens_per_s": round(count / seconds, 2) if seconds else None}
        print(json.dumps(found, ensure_ascii=False), flush=True)
    else:
        print(flush=True)


@contextlib.contextmanager
def _interruptible(response: "Response") -> Iterator[None]:
    """Ctrl-C ends the response after the token at hand; a second one is an interrupt as usual.

    An interrupt in the middle of a compilation leaves JAX in a state in which Python crashes when
    it leaves.
    """
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        response.stop()
        signal.signal(signal.SIGINT, before)

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _converse(
    writer: "Writer", start: "Conversation", model: str, *, as_json: bool
) -> list["Response"]:
    """Each line of standard input one message, until its end or `/exit`; the responses."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{model}\n/reset starts anew, /exit or Ctrl-D leaves", file=sys.stderr)
    talk, responses = start, []
    for line in _lines(terminal):
        if line == "/exit":
            break
        if line == "/reset":
            talk = start
        if line == "/reset" or not line.strip():
            continue
        try:
            asked = talk.asked(line)
            response = writer.respond(asked.ids, turn=len(responses))
        except UserError as error:
            if not terminal:
                raise
            print(f"deltal: {error}", file=sys.stderr)
            continue
        if asked.rewritten and not talk.rewritten:
            note = "note: the chat template rewrites earlier turns: all is encoded anew"
            print(note, file=sys.stderr)
        responses.append(response)
        _show(response, line, as_json=as_json)
        talk = asked.answered(response.ids)
    return responses


def _lines(terminal: bool) -> Iterator[str]:
    """The lines of standard input; asked for where somebody types them."""
    question = ""
    if terminal and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines with it
        question = "> "
    while True:
        if terminal and not question:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input(question)
            line.encode()
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            return
        except UnicodeError:
            raise UserError("--chat: standard input is not valid UTF-8") from None
        yield line


def _describe(checkpoint: "Checkpoint", dtype: str, seconds: float) -> str:
    from deltal_jax.model.transformer import parameter_count

    count = parameter_count(checkpoint.architecture)
    return f"{count:,} parameters in {dtype}, loaded in {seconds:.1f} s"


def _speed(responses: Sequence["Response"]) -> str:
    """Tokens of all responses, and tokens a second without what was compiled."""
    tokens = sum(response.count for response in responses)
    steady = [response.steady for response in responses]
    seconds = sum(seconds for _, seconds in steady)
    rate = f", {sum(count for count, _ in steady) / seconds:.1f} tokens/s" if seconds else ""
    cut = ", cut off" if len(responses) == 1 and responses[0].finish == "length" else ""
    return f"{tokens} {'token' if tokens == 1 else 'tokens'}{cut}{rate}"
