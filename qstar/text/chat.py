"""Conversations: chat messages as text by the tokenizer's own template, and as token ids with a loss mask.

A message is {"role": "system" | "user" | "assistant", "content": text}. Templates are rendered by transformers in jinja2's
sandbox; special tokens that they write are encoded as such, and no BOS is added to theirs.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qstar.errors import UserError, require
from qstar.files import warn
from qstar.text.packing import Example

if TYPE_CHECKING:
    from qstar.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
PROMPTS = "must be text, messages or a list of token ids"  # of errors, behind the number of a prompt

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Words that no template changes.
_SYSTEM, _USER, _ASSISTANT, _OTHER = "qstarSystemText", "qstarUserText", "qstarAssistantText", "OtherText"


class Turn(NamedTuple):
    """The text that a template puts around one exchange."""

    before: str = ""  # what precedes the first user message, a default system message included
    after: str = ""  # between a user message and where the reply is generated
    lead: str = ""  # between that place and the reply's text
    close: str = ""  # behind a reply, up to and with its end token; "" where there is none
    end_id: int | None = None  # the end token of a reply


class ChatTemplate:
    """The chat template of a tokenizer, `Tokenizer.chat`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def render(self, messages: Messages, *, reply: bool = True, goes_on: bool = False) -> str:
        """The text of a conversation, up to where the reply begins (`reply`), or without that.

        Args:
            goes_on: the last message is not ended: a completion continues it.

        Raises:
            UserError: something that is no message, or that the template refuses or leaves out (a system message that
                it leaves out is a warning).
        """
        check_messages(messages)
        text = self._render(messages, reply, goes_on)
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"].strip()
            # A template may change what it writes: left out is a message whose content makes no difference.
            if role == "assistant" or content in text:
                continue
            if text != self._render(_replaced(messages, i, _OTHER), reply, goes_on):
                continue
            fault = f"the tokenizer's chat template leaves out messages of the role {role!r}"
            require((role == "system", f"message {i}: {fault}; the roles are system, user and assistant"))
            warn(f"{fault}, so that the prompt lacks them; put their text into the user's message")
        return text

    def _render(self, messages: Messages, reply: bool, goes_on: bool = False) -> str:
        how = {"add_generation_prompt": reply, "continue_final_message": goes_on}
        try:
            return self.tokenizer.hf.apply_chat_template(list(messages), tokenize=False, **how)
        # A template may raise anything: it is a program.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(str(m["role"]) for m in messages)
            raise UserError(f"the tokenizer's chat template refuses messages of the roles {roles}: {reason}") from error

    @functools.cached_property
    def turn(self) -> Turn:
        """The parts of one exchange; empty for a template that cannot write one."""
        user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
        # Some templates demand a system message.
        for head in ([], [{"role": "system", "content": _SYSTEM}]):
            with contextlib.suppress(UserError):
                before, _, after = self._render([*head, user], True).partition(_USER)
                done, _, closing = self._render([*head, user, assistant], False).rpartition(_ASSISTANT)
                ids = self.tokenizer.encode(closing)
                break
        else:
            return Turn()
        # A reply without thinking, where the template opens a block for it.
        lead = "</think>\n\n" if after.endswith(("<think>", "<think>\n")) else done.partition(_USER + after)[2]
        added = self.tokenizer.hf.added_tokens_decoder
        end = next((i for i in ids if i in added), None)
        if end is None:
            return Turn(before, after, lead)
        token = str(added[end])
        return Turn(before, after, lead, closing[: closing.index(token) + len(token)], end)

    @functools.cached_property
    def has_bos(self) -> bool:
        """Whether the template itself writes a BOS token in front."""
        bos = self.tokenizer.hf.bos_token
        return bool(bos) and self.turn.before.startswith(bos)

    def rendered(self, text: str) -> bool:
        """Whether a text was made by this template: it holds what stands between a question and its reply."""
        after = self.turn.after
        return bool(after.strip()) and after in text

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation, and for each 1 where it is to be learnt: the assistant's texts and end tokens.

        Where the template marks them ({% generation %}) its marks count. Otherwise a reply begins where the text of the
        messages before it ends, and ends with the end-of-turn token.

        Raises:
            UserError: no assistant's text, or a template that writes earlier turns otherwise when others follow.
        """
        text = self.render(messages, reply=False)
        ids = self.tokenizer.encode(text)
        if _GENERATION.search(self.tokenizer.hf.get_chat_template()):
            how: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
            mask = list(self.tokenizer.hf.apply_chat_template(list(messages), **how)["assistant_masks"])
        else:
            spans = [self._span(messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
            offsets = self.tokenizer.offsets(text)
            # A token may begin with the space in front of a reply.
            mask = [int(any(a <= start < b or start < a < end for a, b in spans)) for start, end in offsets]
        require((any(mask), "the conversation has no assistant message with text: there is nothing to train on"))
        return ids, mask

    def _span(self, messages: Messages, i: int, text: str) -> tuple[int, int]:
        # Where message i lies in the text of all, with the end of its turn. A template may write earlier turns otherwise
        # once there are later ones (Mistral moves the system message): then no place is certain.
        before, asked = (self._render(messages[:i], reply) if i else "" for reply in (False, True))
        # Where another reply would make a difference; its first letter may be that of this one by chance.
        others = [self._render(_replaced(messages, i, word), False) for word in (_ASSISTANT, _OTHER)]
        start = min(len(os.path.commonprefix([other, text])) for other in others)
        # Some put an opening <think> behind the question that they leave out of finished turns.
        start = min(start, len(os.path.commonprefix([asked, text]))) if i else start
        if close := self.turn.close:
            at = text.find(close, start)
            end = at + len(close) if at >= 0 else -1
        else:
            done = self._render(messages[: i + 1], False)
            end = len(done) if text.startswith(done) else -1
        fault = "the tokenizer's chat template writes earlier turns otherwise when others follow"
        advice = (
            "so that the tokens of the replies cannot be told apart; give conversations of one question and one reply"
        )
        require((text.startswith(before) and end >= start, f"message {i}: {fault}, {advice}"))
        return start, end


def _replaced(messages: Messages, i: int, content: str) -> Messages:
    return [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is a conversation, neither a text nor a list of token ids."""
    return isinstance(prompt, list | tuple) and any(isinstance(m, Mapping) for m in prompt)


def check_messages(messages: Any) -> None:
    """Raises UserError unless `messages` is a list of {"role": text, "content": text}."""
    listed = isinstance(messages, list | tuple) and len(messages) > 0
    require((listed, 'messages must be a list of {"role": ..., "content": ...}, with at least one'))
    for i, message in enumerate(messages):
        fits = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        require((fits, f'message {i} must be {{"role": text, "content": text}}, not {str(message)[:80]}'))


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer; raises UserError if it has none."""
    if tokenizer.chat is None:
        raise UserError(
            "this model's tokenizer has no chat template (no chat_template in tokenizer_config.json, no "
            "chat_template.jinja): give the prompt as text, or take an instruction-tuned model"
        )
    return tokenizer.chat


def as_text(tokenizer: Tokenizer | None, prompt: Any) -> Any:
    """A conversation as the text up to its reply; any other prompt (text, token ids) as it is.

    Raises:
        UserError: no tokenizer, no chat template, or messages that are none.
    """
    if not is_messages(prompt):
        return prompt
    if tokenizer is None:
        raise UserError("this model has no tokenizer (no tokenizer files in its folder): pass token ids, not messages")
    return template_of(tokenizer).render(prompt)


def text_or_ids(tokenizer: Tokenizer | None, given: Any, must: str) -> str | list[int]:
    """What a caller gave as text or as token ids (a list, an array).

    Raises:
        UserError: `must` ("prompt 3 must be ...") for anything else; text for a model without tokenizer.
    """
    if isinstance(given, str):
        fault = "this model has no tokenizer (no tokenizer files in its folder): pass lists of token ids, not text"
        require((tokenizer is not None, fault))
        return given
    try:
        # `int` would cut 1.7 to 1; bytes are no ids, although they hold whole numbers.
        ids = None if isinstance(given, bytes) else list(map(operator.index, getattr(given, "tolist", lambda: given)()))
    except TypeError:
        ids = None
    if ids is None:
        raise UserError(f"{must}, not {textwrap.shorten(repr(given), 60)}")
    return ids


def chat_example(tokenizer: Tokenizer, messages: Messages) -> Example:
    """A conversation as a training document with loss on the assistant's tokens alone; the ids after these are left out."""
    ids, mask = template_of(tokenizer).encode(messages)
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    return Example(ids[:first], ids[first:last], None if all(mask[first:last]) else tuple(mask[:last]))
