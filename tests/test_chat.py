"""Chat templates: the text of transformers byte for byte, one line for what goes wrong, nothing
reached from inside a template."""

import datetime
import json
from typing import Any

import pytest

from deltal_jax.data.chat import encode_chat, render_chat, turn_end
from deltal_jax.data.tokenizer import read_tokenizer
from deltal_jax.errors import UserError
from tests.small_tokenizers import transformers_tokenizer, write_folder

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}
        {{- '\\n' + message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<call>' + (call | tojson(indent=2)) + '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content']|trim %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = "" %}
{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}
        {{- message['content'] | trim }}
    {%- endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- set ns = namespace(prefix='') -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate:\\n user, assistant, user, ...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (ns.prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{ part['text'] | trim if part['type'] == 'text' else '?' }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

TEMPLATES = {"qwen": CHATML, "llama": LLAMA3, "gemma": GEMMA}
LLAMA_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>")
DATE = {"date_string": "26 Jul 2024"}

USER = {"role": "user", "content": "What is <b>1 + 2</b>, \"quoted\" & 'so'? 数学 🎉 "}
SYSTEM = {"role": "system", "content": "Reason step by step.\n"}
ANSWER = {"role": "assistant", "content": "\n\\boxed{3}"}
AGAIN = {"role": "user", "content": "  And {{ 7 * 7 }}?\r\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"name": "add", "arguments": {"b": 2, "a": "é<&>"}}],
}
CONVERSATIONS = ([USER], [SYSTEM, USER], [USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER])
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c'"}}]


def render(template: str, *messages: dict[str, Any], prompt: bool = False, **variables: Any) -> str:
    return render_chat(template, messages or (USER,), add_generation_prompt=prompt, **variables)


def test_a_chatml_conversation_renders_to_this_text():
    assert render(CHATML, {"role": "user", "content": "1 < 2?"}, prompt=True) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\n1 < 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, SYSTEM, ANSWER) == (
        "<|im_start|>system\nReason step by step.\n<|im_end|>\n"
        "<|im_start|>assistant\n\n\\boxed{3}<|im_end|>\n"
    )


def test_a_llama_conversation_renders_to_this_text():
    text = render(LLAMA3, SYSTEM, USER, prompt=True, bos_token="<|begin_of_text|>", **DATE)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today: 26 Jul 2024\n\nReason step by step.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "What is <b>1 + 2</b>, \"quoted\" & 'so'? 数学 🎉<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_gemma_conversation_renders_to_this_text():
    assert render(GEMMA, SYSTEM, AGAIN, prompt=True, bos_token="<bos>") == (
        "<bos><start_of_turn>user\nReason step by step.\n\n\nAnd {{ 7 * 7 }}?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("family", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(family, messages, prompt, tmp_path):
    theirs = transformers_tokenizer(write_folder(tmp_path, family, template=TEMPLATES[family]))
    ours = read_tokenizer(tmp_path)
    options = {"add_generation_prompt": prompt, **DATE}
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    template, tokens = ours.chat_templates["default"], ours.special_tokens
    assert render_chat(template, messages, **options, **tokens) == text
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert encode_chat(ours, messages, **options) == ids


@pytest.mark.parametrize(
    ("messages", "variables"),
    [
        ([USER, CALL], {}),
        ([SYSTEM, USER, CALL], {"tools": TOOLS}),
        ([USER], {"tools": TOOLS, "enable_thinking": False}),
        ([USER], {"enable_thinking": False}),
    ],
)
def test_tools_and_variables_render_as_in_transformers(messages, variables, tmp_path):
    theirs = transformers_tokenizer(write_folder(tmp_path, "qwen", template=CHATML))
    text = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **variables
    )
    assert render(CHATML, *messages, prompt=True, **variables) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token is defined }} {{ unk_token is defined }} {{ tools is none }} {{ nothing }}",
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "  {% if true %}\n  indented\n  {% endif %}\nend\n",
        "{{ {'b': 1, 'a': '<é>'} | tojson }} {{ [1, {'x': none}] | tojson(indent=4) }}",
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{{ '<é>' | tojson(ensure_ascii=true) }}{{ messages | tojson }}",
        "{{ dict(a=1, b=[2]).items() | list }}{{ messages[0].get('name', 'none') }}",
        "{%- macro show(m) %}({{ m.role }}){% endmacro %}{{ show(messages[0]) }}\r\nend",
        "{{ strftime_now('%Y') }}",
    ],
)
def test_the_language_of_templates_is_that_of_transformers(template, tmp_path):
    theirs = transformers_tokenizer(write_folder(tmp_path, "llama", template=template))
    text = theirs.apply_chat_template([USER], tokenize=False)
    tokens = read_tokenizer(tmp_path).special_tokens
    assert render(template, **tokens) == text


def test_json_is_neither_escaped_nor_sorted():
    value = {"b": "<a & 'b'>", "a": "数学"}
    assert render("{{ value | tojson }}", value=value) == json.dumps(value, ensure_ascii=False)


def test_a_template_may_ask_for_the_date():
    before = datetime.date.today().year
    assert int(render("{{ strftime_now('%Y') }}")) - before in (0, 1)


def test_tokens_that_are_not_given_are_undefined():
    template = "{{ bos_token is defined }} {{ eos_token is defined }}"
    assert render(template) == "False False"
    assert render(template, eos_token="</s>") == "False True"


def test_a_generation_block_prints_what_is_in_it_and_keeps_its_variables():
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render(template) == "21"


def test_a_field_that_is_none_is_not_there():
    assert render("{{ 'content' in messages[0] }} {{ messages[0].content }}", CALL) == "False "


def test_messages_are_data_and_never_templates():
    attack = "{{ messages }}{% set a = 1 %}{# no #}"
    assert render("{{ messages[0].content }}", {"role": "user", "content": attack}) == attack


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ strftime_now.__globals__.datetime.datetime }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__.sys }}",
        "{{ self.__init__.__globals__.sys }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ''.format_map({}).__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ messages[0].content.parts.append(1) }}",
        "{{ dict.update(messages[0], content='x') }}",
        "{{ range(999999999) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ __import__('os') }}",
    ],
)
def test_an_attack_from_a_template_is_refused(attack):
    message = {"role": "user", "content": {"parts": []}}
    with pytest.raises(UserError, match=r"^data\.chat_template: the chat template fails: "):
        render(attack, message)
    assert message == {"role": "user", "content": {"parts": []}}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only\\n one system\\tturn') }}", "Only one system turn"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{% generation %}", "Unexpected end of template"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages | nosuchfilter }}", "No filter named 'nosuchfilter'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    ],
)
def test_what_fails_in_a_template_is_one_line(template, reason):
    with pytest.raises(UserError) as refused:
        render(template)
    assert str(refused.value).startswith("data.chat_template: the chat template fails: ")
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_roles_out_of_order_are_refused_with_the_words_of_the_template():
    with pytest.raises(UserError, match="Roles must alternate: user, assistant, user"):
        render(GEMMA, USER, USER)


def test_a_conversation_needs_a_message():
    with pytest.raises(UserError, match="at least one message"):
        render_chat(CHATML, [], add_generation_prompt=True)


def test_ids_of_a_conversation_hold_each_special_token_once(tmp_path):
    tokenizer = read_tokenizer(write_folder(tmp_path, "llama", template=LLAMA3))
    ids = encode_chat(tokenizer, [USER, ANSWER, AGAIN], **DATE)
    begin, eot, start = (tokenizer.encode(t)[0] for t in LLAMA_TOKENS)
    assert ids[0] == begin and ids.count(begin) == 1
    assert (ids.count(eot), ids.count(start)) == (4, 5)
    assert tokenizer.decode(ids).endswith("And {{ 7 * 7 }}?assistant\n\n")
    assert encode_chat(tokenizer, [USER], add_generation_prompt=False, **DATE)[-1] == eot


def test_a_template_file_comes_before_the_config(tmp_path):
    write_folder(tmp_path, "qwen", template="config")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(encode_chat(tokenizer, [USER])) == "config"
    (tmp_path / "chat_template.jinja").write_text("the {{ messages[0].role }}")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(encode_chat(tokenizer, [USER])) == "the user"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    tokenizer = read_tokenizer(write_folder(tmp_path, "qwen", config={"chat_template": named}))
    assert dict(tokenizer.chat_templates) == {"rag": "rag", "default": "plain"}
    assert tokenizer.decode(encode_chat(tokenizer, [USER])) == "plain"
    assert transformers_tokenizer(tmp_path).apply_chat_template([USER], tokenize=False) == "plain"


def test_a_tokenizer_without_a_default_template_says_so(tmp_path):
    with pytest.raises(UserError, match="no default chat template; set it to false"):
        encode_chat(read_tokenizer(write_folder(tmp_path, "qwen")), [USER])
    named = {"chat_template": [{"name": "rag", "template": "rag"}]}
    with pytest.raises(UserError, match=r"no default chat template \(only rag\)"):
        encode_chat(read_tokenizer(write_folder(tmp_path, "qwen", config=named)), [USER])


def test_a_variable_overrides_a_special_token(tmp_path):
    tokenizer = read_tokenizer(write_folder(tmp_path, "qwen", template="{{ eos_token }} {{ x }}"))
    assert tokenizer.decode(encode_chat(tokenizer, [USER], x=1)) == " 1"
    assert tokenizer.decode(encode_chat(tokenizer, [USER], x=1, eos_token="end")) == "end 1"


@pytest.mark.parametrize(
    ("family", "template", "end"),
    [
        ("qwen", "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        (
            "gemma",
            "{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}",
            "<end_of_turn>",
        ),
        ("gemma", "{% for m in messages %}{{ m.content }}{% endfor %}", "<eos>"),
    ],
)
def test_a_turn_ends_as_the_template_ends_it(family, template, end, tmp_path):
    """Gemma's own eos_token is another than what its template writes."""
    tokenizer = read_tokenizer(write_folder(tmp_path, family, template=template))
    ids = {text: tokenizer.encode(text) for text in ("<|im_end|>", "<end_of_turn>", "<eos>")}
    assert [turn_end(tokenizer)] == ids[end]
