"""A conversation as ids: what a model has written stays as it was sampled, never tokenised again.

A template knows only text. So the next turn's ids are those so far, plus the ids of what the
template's text adds behind the model's turn: its end, the user's next message, the beginning of the
next turn.
"""

import dataclasses

from deltal_jax.data.chat import Message, default_template, render_chat
from deltal_jax.data.tokenizer import Tokenizer
from deltal_jax.errors import UserError

#: Text before what is encoded by itself: at the very beginning of a text some tokenizers add a
#: space.
ANCHOR = "x"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and their ids. `asked` and `answered` give the conversation after one more turn."""

    tokenizer: Tokenizer
    messages: tuple[Message, ...] = ()
    #: What the model is given, and after `answered` also what it gave, without its EOS.
    ids: tuple[int, ...] = ()
    #: The text of the messages when the model was last asked.
    text: str = ""
    #: Whether the last `asked` had to encode the whole conversation anew.
    rewritten: bool = False

    @classmethod
    def start(cls, tokenizer: Tokenizer, system: str | None = None) -> "Conversation":
        """A conversation in the tokenizer's own template.

        Raises UserError where it has none.
        """
        default_template(tokenizer, "--chat", "--prompt alone continues plain text")
        first = () if system is None else ({"role": "system", "content": system},)
        return cls(tokenizer, first)

    def asked(self, content: str) -> "Conversation":
        """After the user's message: `ids` are the model's prompt.

        Raises UserError where the template fails, or the tokenizer on the text.
        """
        messages = (*self.messages, {"role": "user", "content": content})
        text = render_chat(
            self.tokenizer.chat_templates["default"],
            messages,
            add_generation_prompt=True,
            **self.tokenizer.special_tokens,
        )
        added = self._added(text) if self.ids else None
        ids = self.tokenizer.encode(text) if added is None else [*self.ids, *added]
        rewritten = bool(self.ids) and added is None
        return dataclasses.replace(
            self, messages=messages, ids=tuple(ids), text=text, rewritten=rewritten
        )

    def answered(self, sampled: list[int]) -> "Conversation":
        """After the model's turn. An EOS at its end is left to the template, which writes one of
        its own where it wants one."""
        ended = bool(sampled) and sampled[-1] in self.tokenizer.eos_ids
        content = sampled[:-1] if ended else sampled
        answer = {"role": "assistant", "content": self.tokenizer.decode(content)}
        return dataclasses.replace(
            self, messages=(*self.messages, answer), ids=(*self.ids, *content)
        )

    def _added(self, text: str) -> list[int] | None:
        """Ids of what `text` has behind the model's turn; None where it doesn't hold all before
        that as it was, but for white space around the turn: some templates drop what a model
        thought."""
        if not text.startswith(self.text):
            return None
        rest, answer = text[len(self.text) :], self.messages[-1]["content"]
        forms = (answer, answer.rstrip(), answer.lstrip(), answer.strip())
        written = next((form for form in forms if rest.startswith(form)), None)
        if written is None:
            return None
        try:
            before = self.tokenizer.encode(ANCHOR)
            whole = self.tokenizer.encode(ANCHOR + rest[len(written) :])
        except UserError:  # the anchor may be in no vocabulary; what else isn't fails again
            return None
        return whole[len(before) :] if whole[: len(before)] == before else None
