"""Text and conversations from checkpoint folders: what is drawn, what is fed, what is refused."""

import io
import itertools
import json
import signal

import jax
import numpy as np
import pytest

from deltal_jax.cli.main import main
from deltal_jax.data.chat import encode_chat
from deltal_jax.data.conversation import Conversation
from deltal_jax.data.tokenizer import read_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.model.huggingface import load_architecture, load_params
from deltal_jax.rollout.stream import Streamer
from deltal_jax.rollout.text import Response, Writer, open_checkpoint
from tests import fakes, small_tokenizers
from tests.test_chat import CHATML, DATE, GEMMA, LLAMA3

CONFIGS = {"qwen": "qwen3", "llama": "llama", "gemma": "gemma3"}
TEMPLATES = {
    "qwen": CHATML,
    "llama": LLAMA3.replace('strftime_now("%d %b %Y")', repr(DATE["date_string"])),
    "gemma": GEMMA,
}
#: Drops what a model thought from all turns but the last, as Qwen3 does.
FORGETFUL = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}
"""
PLAIN = """\
{% for message in messages %}{{ message.role }}:{{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
PROMPT = "The quick brown"
EXACT = ("--dtype", "float32", "--temperature", "0")


def write(folder, family, template=None, *, context=256, **generation):
    """A random model with a small real tokenizer."""
    vocab = small_tokenizers.build(family)[0].get_vocab_size()
    config = fakes.CONFIGS[CONFIGS[family]] | {"max_position_embeddings": context}
    # More rows than ids, as published models have.
    fakes.write_checkpoint(folder, config | {"vocab_size": vocab + 3})
    small_tokenizers.write_folder(folder, family, template=template or TEMPLATES[family])
    if generation:
        small_tokenizers.write_json(folder / "generation_config.json", generation)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: write(root / family, family) for family in CONFIGS}


@pytest.fixture
def deltal(capsys, monkeypatch):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def deltal(*arguments, stdin="", terminal=False):
        given = io.StringIO(stdin)
        monkeypatch.setattr(given, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr("sys.stdin", given)
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return deltal


@pytest.fixture
def fed(monkeypatch):
    """(prompt ids, ids drawn) of every response from now on."""
    found = []
    stream = Streamer.stream

    def watched(self, prompts, *rest, **options):
        drawn = []
        found.append((prompts.tokens[0, : prompts.lengths[0]].tolist(), drawn))
        for token in stream(self, prompts, *rest, **options):
            drawn.append(token)
            yield token

    monkeypatch.setattr(Streamer, "stream", watched)
    return found


def greedy(folder, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens by the full forward, each given all before it."""
    arch = load_architecture(folder)
    params, row = load_params(folder, arch), np.zeros((1, 64), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        row[0, at] = fakes.forward(arch, params, row)[0, at - 1].argmax()
    return row[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_text_is_that_of_the_full_forward(deltal, fed, folders, family):
    tokenizer = read_tokenizer(folders[family])
    prompt = tokenizer.encode(PROMPT, bos=True)
    want = greedy(folders[family], prompt, 12)
    options = ("--prompt", PROMPT, "--max-tokens", 12, *EXACT)
    code, out, err = deltal("sample", "--model", folders[family], *options)
    assert (code, fed) == (0, [(prompt, want)])
    assert out == tokenizer.decode(want) + "\n"
    assert err.startswith("12 tokens, cut off, ") and err.count("\n") == 1
    assert "tokens/s" in err and "parameters in float32, loaded in" in err


@pytest.mark.parametrize("at", [3, 6])
def test_a_response_ends_at_any_of_several_ends(deltal, tmp_path, folders, at):
    tokenizer = read_tokenizer(folders["qwen"])
    want = greedy(folders["qwen"], tokenizer.encode(PROMPT), 8)
    assert want[at] not in want[:at]
    unseen = next(i for i in range(300) if i not in want)
    folder = write(tmp_path / "ends", "qwen", eos_token_id=[unseen, want[at]])
    command = ("sample", "--model", folder, "--prompt", PROMPT, *EXACT)
    code, out, err = deltal(*command, "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert found.pop("seconds") > 0 and found.pop("tokens_per_s") > 0
    assert found == {
        "prompt": PROMPT,
        "response": tokenizer.decode(want[:at]),
        "tokens": at,
        "finish": "eos",
    }
    assert err.startswith(f"{at} tokens, ")
    assert deltal(*command)[1] == tokenizer.decode(want[:at]) + "\n"


def test_parts_come_with_their_tokens_and_join_to_the_text(folders):
    writer = Writer(open_checkpoint(folders["gemma"]), max_tokens=40, dtype="float32")
    ids = writer.checkpoint.tokenizer.encode(PROMPT, bos=True)
    response = writer.respond(ids)
    shown = [(len(response.ids), part) for part in response]
    assert "".join(part for _, part in shown) == response.text
    assert response.text == writer.checkpoint.tokenizer.decode(response.ids)
    counts = [count for count, _ in shown]
    assert len(counts) > 5 and counts == sorted(counts) and counts[0] < 20
    assert all(part for _, part in shown)
    assert (response.count, response.ended) == (40, False)


def test_the_seed_decides_and_bfloat16_is_the_default(deltal, folders):
    command = ("sample", "--model", folders["llama"], "--prompt", PROMPT, "--max-tokens", 16)
    code, first, err = deltal(*command, "--seed", 5)
    assert code == 0 and "parameters in bfloat16" in err
    assert deltal(*command, "--seed", 5, "--dtype", "bfloat16")[1] == first
    assert deltal(*command, "--seed", 6)[1] != first


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"do_sample": False, "temperature": 0.6}, 1.0),
        ({"temperature": 0.6}, 1.0),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"do_sample": True}, 1.0),
    ],
)
def test_the_temperature_is_that_of_the_generation_config(tmp_path, generation, want):
    write(tmp_path, "qwen", eos_token_id=0, **generation)
    assert open_checkpoint(tmp_path).temperature == want


def test_the_default_temperature_is_used(deltal, tmp_path, folders):
    folder = write(tmp_path, "qwen", eos_token_id=402, do_sample=True, temperature=0)
    command = ("--prompt", PROMPT, "--max-tokens", 8, "--dtype", "float32")
    found = deltal("sample", "--model", folder, *command)[1]
    assert found == deltal("sample", "--model", folders["qwen"], *command, "--temperature", 0)[1]
    assert found != deltal("sample", "--model", folder, *command, "--temperature", 1)[1]


def test_a_prompt_may_come_from_standard_input(deltal, fed, folders):
    command = ("sample", "--model", folders["qwen"], "--max-tokens", 2, "--prompt")
    assert deltal(*command, "-", stdin="a\nb\n\n")[0] == 0
    assert fed[0][0] == read_tokenizer(folders["qwen"]).encode("a\nb\n")


def test_a_response_ends_where_the_context_does(deltal, tmp_path):
    folder = write(tmp_path, "qwen", context=9, eos_token_id=0)
    count = len(read_tokenizer(folder).encode("1234567"))
    assert count == 7
    command = ("sample", "--model", folder, *EXACT, "--json", "--prompt")
    found = json.loads(deltal(*command, "1234567")[1])
    assert (found["tokens"], found["finish"]) == (2, "length")
    assert deltal(*command, "123456789") == (
        *(2, ""),
        "deltal: --prompt: 9 tokens leave no room for a response in the model's context of 9 "
        "(max_position_embeddings)\n",
    )


def test_prompts_of_all_widths_share_one_compiled_decoding(folders):
    writer = Writer(open_checkpoint(folders["qwen"]), max_tokens=100)
    for length in (5, 63, 64, 65, 120):
        response = writer.respond([7] * length)
        list(itertools.islice(response, 3))
        assert len(response.ids) >= 2
    assert writer._streamer._prefill._cache_size() == 2
    assert writer._streamer._decode._cache_size() == 1
    assert writer._streamer._draw._cache_size() == 1


def conversation(tmp_path, family, template):
    tokenizer = read_tokenizer(small_tokenizers.write_folder(tmp_path, family, template=template))
    return tokenizer, Conversation.start(tokenizer).asked("What is 1 + 2?")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("answer", ["It is 3", "  so 7\n", "", "café 🎉"])
def test_a_sampled_turn_stays_as_it_was_sampled(tmp_path, family, answer):
    tokenizer, asked = conversation(tmp_path, family, TEMPLATES[family])
    assert list(asked.ids) == encode_chat(tokenizer, asked.messages)
    # The template's own end; each character by itself, as no tokenizer would write it.
    end = tokenizer.eos_ids[-1] if family == "gemma" else tokenizer.eos_ids[0]
    sampled = [i for letter in answer for i in tokenizer.encode("x" + letter)[1:]]
    again = asked.answered([*sampled, end]).asked("And 2 + 2?")
    if family == "qwen" and not answer:  # this template opens an empty turn in another way
        assert again.rewritten
        return
    fed = [*asked.ids, *sampled, end]
    assert not again.rewritten and list(again.ids[: len(fed)]) == fed
    third = again.answered([*sampled, end]).asked("And?")
    assert third.ids[: len(again.ids)] == again.ids
    # With what tokenizing gives, the whole is what the template's whole text gives.
    usual = tokenizer.encode("x" + answer.strip())[1:]
    whole = asked.answered([*usual, end]).asked("And 2 + 2?")
    assert list(whole.ids) == encode_chat(tokenizer, whole.messages)
    assert answer != "It is 3" or sampled != usual


def test_a_turn_that_was_cut_off_gets_the_end_that_the_template_writes(tmp_path):
    tokenizer, asked = conversation(tmp_path, "qwen", CHATML)
    end, other = tokenizer.eos_ids
    said = tokenizer.encode("It is")
    cut = asked.answered(said).asked("Go on")
    fed = [*asked.ids, *said, end]
    assert list(cut.ids[: len(fed)]) == fed
    assert asked.answered([*said, other]).asked("Go on").ids == cut.ids
    assert asked.answered([*said, end]).asked("Go on").ids == cut.ids


def test_a_template_that_forgets_thoughts_has_all_encoded_anew(tmp_path):
    tokenizer, asked = conversation(tmp_path, "qwen", FORGETFUL)
    end = tokenizer.eos_ids[0]
    thought = [*tokenizer.encode("<think>1, 2, 3</think>It is 3"), end]
    again = asked.answered(thought).asked("And 2 + 2?")
    assert again.rewritten
    assert list(again.ids) == encode_chat(tokenizer, again.messages)
    assert "think" not in tokenizer.decode(list(again.ids))
    said = tokenizer.encode("4")
    third = again.answered([*said, end]).asked("And?")
    assert not third.rewritten
    assert list(third.ids[: len(again.ids) + 2]) == [*again.ids, *said, end]


def test_text_between_turns_is_encoded_as_in_the_middle_of_a_text(tmp_path):
    """Llama 2's tokenizer puts a space before the very first text."""
    tokenizer, asked = conversation(tmp_path, "llama2", PLAIN)
    said = tokenizer.encode("x7")[-1:]
    again = asked.answered(said).asked("And 2 + 2?")
    assert not again.rewritten
    assert list(again.ids) == encode_chat(tokenizer, again.messages)
    assert tokenizer.decode(list(again.ids)).endswith("assistant:7\nuser:And 2 + 2?\nassistant:")


def test_a_refused_message_leaves_the_conversation_as_it_was(tmp_path):
    template = "{% if messages[-1].content == '?' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    _, asked = conversation(tmp_path, "qwen", template)
    answered = asked.answered([5])
    with pytest.raises(UserError, match="the chat template fails: no"):
        answered.asked("?")
    assert answered.asked("And?").ids[: len(asked.ids)] == asked.ids


def test_a_conversation_feeds_back_what_was_sampled(deltal, fed, folders):
    options = ("--chat", "--system", "Be short.", "--max-tokens", 10, "--json", "--seed", 3)
    said = "hello\n\n   \nhello\n/reset\nhello\n/exit\nnever\n"
    code, out, err = deltal("sample", "--model", folders["gemma"], *options, stdin=said)
    assert code == 0
    (first, drawn), (second, _), (third, other) = fed
    tokenizer = read_tokenizer(folders["gemma"])
    system = {"role": "system", "content": "Be short."}
    assert first == encode_chat(tokenizer, [system, {"role": "user", "content": "hello"}])
    assert second[: len(first) + len(drawn)] == first + drawn
    assert third == first and other != drawn  # new random numbers
    turns = [json.loads(line) for line in out.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["hello"] * 3
    assert turns[0]["response"] == tokenizer.decode(drawn)
    assert all(turn.keys() == turns[0].keys() for turn in turns)
    assert err.startswith(f"{sum(turn['tokens'] for turn in turns)} tokens, ")


def test_a_conversation_prints_each_response_and_nothing_else(deltal, fed, folders):
    options = ("--chat", "--max-tokens", 6)
    code, out, err = deltal("sample", "--model", folders["qwen"], *options, stdin="a\nb")
    tokenizer = read_tokenizer(folders["qwen"])
    assert code == 0 and len(fed) == 2 and err.count("\n") == 1
    texts = [tokenizer.decode([i for i in d if i not in tokenizer.eos_ids]) for _, d in fed]
    assert out == "".join(text + "\n" for text in texts)


def test_one_templated_question(deltal, fed, folders):
    options = ("--chat", "--prompt", "hello", "--max-tokens", 6)
    assert deltal("sample", "--model", folders["llama"], *options, stdin="no")[0] == 0
    tokenizer = read_tokenizer(folders["llama"])
    assert [ids for ids, _ in fed] == [
        encode_chat(tokenizer, [{"role": "user", "content": "hello"}])
    ]


def test_a_rewriting_template_is_noted_once(deltal, fed, tmp_path, monkeypatch):
    folder = write(tmp_path, "qwen", "{{ messages | length }}" + CHATML)
    options = ("--chat", "--max-tokens", 3)
    code, _, err = deltal("sample", "--model", folder, *options, stdin="a\nb\nc\n")
    assert code == 0 and len(fed) == 3
    note, summary = err.splitlines()
    assert note == "note: the chat template rewrites earlier turns: all is encoded anew"
    assert summary.startswith("9 tokens")


def test_on_a_terminal_a_refused_message_does_not_end_the_conversation(deltal, fed, tmp_path):
    folder = write(tmp_path, "qwen", context=80, eos_token_id=0)
    command = ("sample", "--model", folder, "--chat", "--max-tokens", 2)
    said = f"a\n{'7' * 80}\nb\n"
    code, _, err = deltal(*command, stdin=said, terminal=True)
    assert code == 0 and len(fed) == 2
    assert err.splitlines()[1] == "/reset starts anew, /exit or Ctrl-D leaves"
    refusal = "leave no room for a response in the model's context of 80"
    assert refusal in err and err.count("> ") == 4
    code, _, err = deltal(*command, stdin=said)
    assert code == 2 and err.startswith("deltal: --prompt: ") and refusal in err


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C while the third token of the first response is drawn."""
    stream, calls = Streamer.stream, itertools.count()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def broken(*arguments, **options):
        first = next(calls) == 0
        for count, token in enumerate(stream(*arguments, **options)):
            if first and count == 2:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(Streamer, "stream", broken)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_ctrl_c_ends_a_response_and_the_conversation_goes_on(interrupted, fed, deltal, folders):
    command = ("sample", "--model", folders["gemma"], "--max-tokens", 6, "--chat", "--json")
    code, out, _ = deltal(*command, stdin="a\nb\n")
    turns = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [turn["finish"] for turn in turns] == ["interrupted", "length"]
    (first, drawn), (second, _) = fed
    assert len(drawn) == 3 and second[: len(first) + 3] == first + drawn


def test_ctrl_c_ends_the_program_without_a_conversation(interrupted, deltal, folders):
    command = ("sample", "--model", folders["gemma"], "--prompt", PROMPT)
    code, out, err = deltal(*command)
    assert (code, err) == (130, "deltal: stopped\n") and out.endswith("\n")


def test_a_stopped_response_lets_go_of_what_the_sampler_holds(folders):
    """A conversation keeps its responses."""
    held = {"cache"}

    def tokens():
        try:
            yield from (5, 6, 7)
        finally:
            held.clear()

    response = Response(tokens(), read_tokenizer(folders["qwen"]))
    for _ in response:
        response.stop()
    assert (response.finish, response.ids, held) == ("interrupted", [5], set())


REFUSALS = {
    "prompt of a run": (["RUN", "--prompt", "x"], "--prompt: needs --model FOLDER, not a run"),
    "chat with a run": (["RUN", "--chat"], "--chat: needs --model FOLDER, not a run folder"),
    "tokens of a run": (["RUN", "--max-tokens", "3"], "--max-tokens: needs --model FOLDER"),
    "run and model": (
        ["RUN", "--model", "MODEL", "--chat"],
        "--model: takes no RUN beside it, got 'RUN'; name one of them",
    ),
    "nothing to say": (
        ["--model", "MODEL"],
        "--model: add --prompt TEXT to continue a text, or --chat for messages",
    ),
    "system alone": (
        ["--model", "MODEL", "--prompt", "x", "--system", "y"],
        "--system: only with --chat",
    ),
    "no folder": (
        ["--model", "nowhere", "--prompt", "x"],
        "--model: no folder nowhere, and it is no hub id (organization/name)",
    ),
    "empty folder": (["--model", "EMPTY", "--chat"], "--model: EMPTY has no config.json"),
    "no template": (
        ["--model", "BARE", "--chat"],
        "--chat: the tokenizer has no default chat template; --prompt alone continues plain text",
    ),
    "dtype": (
        ["--model", "MODEL", "--chat", "--dtype", "int8"],
        "--dtype: 'int8' is not one of bfloat16, float32",
    ),
    "no tokens": (
        ["--model", "MODEL", "--chat", "--max-tokens", "0"],
        "--max-tokens: must be at least 1, got 0",
    ),
    "cold": (
        ["--model", "MODEL", "--chat", "--temperature", "-1"],
        "--temperature: must be at least 0 and finite, got -1.0",
    ),
    "hot": (
        ["--model", "MODEL", "--chat", "--temperature", "nan"],
        "--temperature: must be at least 0 and finite, got nan",
    ),
    "seed": (
        ["--model", "MODEL", "--chat", "--seed", "-1"],
        "--seed: must be in 0 … 2147483647, got -1",
    ),
    "empty prompt": (
        ["--model", "MODEL", "--prompt", ""],
        "--prompt: the text is empty, and the tokenizer puts no BOS before it",
    ),
    "no text": (
        ["--model", "MODEL", "--prompt", "a\udcff"],
        "--prompt: the text is not valid UTF-8",
    ),
    "small model": (
        ["--model", "SMALL", "--prompt", "x"],
        "--model: the tokenizer has ids up to 402, but the model has only 48 rows (vocab_size)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line(deltal, folders, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "MODEL").symlink_to(folders["qwen"])
    small_tokenizers.write_folder(tmp_path / "BARE", "qwen")
    (tmp_path / "BARE" / "config.json").write_text((folders["qwen"] / "config.json").read_text())
    fakes.write_checkpoint(tmp_path / "SMALL", fakes.CONFIGS["qwen3"])
    small_tokenizers.write_folder(tmp_path / "SMALL", "qwen")
    arguments, message = REFUSALS[case]
    code, out, err = deltal("sample", *arguments, stdin="hello\n")
    assert (code, out) == (2, "")
    assert err.startswith(f"deltal: {message}") and err.count("\n") == 1


def test_bad_text_on_standard_input_is_refused(deltal, folders, monkeypatch):
    command = ("sample", "--model", folders["qwen"])
    for option in ("--prompt=-", "--chat"):
        code, _, err = deltal(*command, option, stdin="a\udcff\n")
        assert code == 2 and "not valid UTF-8" in err and err.count("\n") == 1


def test_what_needs_the_weights_comes_last(deltal, folders, monkeypatch):
    """A prompt is refused before gigabytes are read."""
    monkeypatch.setattr(jax, "make_array_from_callback", None)
    code, _, err = deltal("sample", "--model", folders["qwen"], "--prompt", "7" * 300)
    assert code == 2 and "leave no room" in err
