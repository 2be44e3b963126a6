"""Chat templates: messages to text, byte for byte as transformers renders them.

Templates come with checkpoints from strangers, so they run in jinja2's sandbox: they see the
messages and the special tokens, and can neither change them nor reach Python through them.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltal_jax.data.tokenizer import Tokenizer
from deltal_jax.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

#: `role` and `content`, and whatever else a template reads; plain JSON data.
Message = Mapping[str, Any]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Ids of a conversation in the tokenizer's own template, which writes BOS where it wants one.

    Raises UserError where the tokenizer has no template, or the template fails.
    """
    otherwise = "set it to false, or use a checkpoint whose tokenizer.json comes with one"
    template = default_template(tokenizer, "data.chat_template", otherwise)
    variables = {**tokenizer.special_tokens, **variables}
    text = render_chat(template, messages, add_generation_prompt=add_generation_prompt, **variables)
    return tokenizer.encode(text)


def default_template(tokenizer: Tokenizer, field: str, otherwise: str) -> str:
    """The tokenizer's usual template.

    Raises UserError where it has none, naming the `field` that asked for it and what to do
    `otherwise`.
    """
    templates = tokenizer.chat_templates
    if "default" not in templates:
        others = f" (only {', '.join(templates)})" if templates else ""
        raise UserError(f"{field}: the tokenizer has no default chat template{others}; {otherwise}")
    return templates["default"]


def turn_end(tokenizer: Tokenizer) -> int:
    """The EOS id with which the template ends a turn of the model; the tokenizer's own where it
    writes none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=False)
    return next((i for i in reversed(ids) if i in tokenizer.eos_ids), tokenizer.eos_ids[0])


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation; a generation prompt opens the next turn of the model.

    Tokens that are None are undefined in the template, `tools` and `documents` are none. Raises
    UserError for whatever goes wrong in the template.
    """
    if not messages:
        raise UserError("data.chat_template: a conversation needs at least one message")
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    context = {
        # A field that is None (the content of a tool call) is one that isn't there.
        "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **{name: text for name, text in tokens.items() if text is not None},
        **variables,
    }
    try:
        return _compile(template).render(context)
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.chat_template: the chat template fails: {reason}") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> "Template":
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` … `{% endgeneration %}` marks what the model wrote, and prints it."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    # The class itself hands out unbound methods, and `dict.update` changes what it is given.
    environment.globals["dict"] = _new_dict
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes it for HTML, and sorts keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
