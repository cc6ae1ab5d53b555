"""From a conversation to token ids, and to the range of tokens that is the assistant's answer.

A generated answer's range is known by construction. For an imported one it comes from the chat template: the text is
rendered up to the answer and with it, and what the template added tells where the answer lies. Nothing is ever found by
searching for the answer in the conversation. In both cases decoding the range must give the answer back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from persona_ray.errors import InputError
from persona_ray.spec import Int32, Message, digest_of

SPAN_RULE = "answer tokens by construction or template; without header, end of turn, outer white space or think block; v1"
THINK_TAGS = ("<think>", "</think>")
DATE = date(2024, 7, 26)
"""Some templates write today's date into the prompt; a resumed run must ask what the first one asked. Llama 3's own default."""
DATE_FORMATS = ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%d %B %Y", "%Y", "%m", "%d")


@dataclass(frozen=True, slots=True)
class Transcript:
    """Token ids (int32) up to the answer's end, and the half-open range of the answer. `refusal` says why there is none."""

    token_ids: Int32
    start: int
    end: int
    refusal: str | None = None


class Transcriber:
    """A tokenizer with its chat template."""

    def __init__(self, location: str, revision: str | None = None) -> None:
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, revision=revision)
        except (OSError, ValueError) as error:
            raise InputError(f"model.id: {location} has no tokenizer that opens: {str(error).strip().splitlines()[0]}") from error
        if not self.tokenizer.chat_template:
            raise InputError(f"model.id: {location} has no chat template; models without one are not available in this version")
        self._template = timeless(str(self.tokenizer.get_chat_template()))
        if not self.tokenizer.is_fast:
            raise InputError(f"model.id: {location} has no fast tokenizer; spans need its character offsets")
        self.has_system_role = self._takes_a_system_message()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-turn token, if it names one."""
        stop = self.tokenizer.eos_token_id
        return () if stop is None else (int(stop),)

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's whole definition."""
        return digest_of(self.tokenizer.backend_tokenizer.to_str())

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template as it is used, and of how an instruction reaches a model without a system role."""
        return digest_of([self._template, self.has_system_role])

    def prompt_ids(self, conversation: Sequence[Message]) -> Int32:
        """Token ids (int32) of the conversation and the header of the assistant's next turn."""
        return self._encode(self._render(conversation, add_generation_prompt=True))

    def generated(self, prompt_ids: Int32, answer_ids: Int32) -> tuple[str, Transcript]:
        """The answer's text, and its transcript: the range is where the answer's ids were put."""
        text = self.text(answer_ids)
        token_ids = np.concatenate([prompt_ids, answer_ids]).astype(np.int32)
        if any(tag in text for tag in THINK_TAGS):
            return text, _refused("answer with a think block", token_ids)
        start, end = self._without_outer_space(token_ids, len(prompt_ids), len(token_ids))
        if start == end:
            return text, _refused("empty answer", token_ids)
        return text, Transcript(token_ids, start, end)

    def imported(self, conversation: Sequence[Message]) -> Transcript:
        """The transcript of a conversation whose last message is the assistant's."""
        answer = conversation[-1].content
        if not answer.strip():
            return _refused("empty answer")
        if any(tag in answer for tag in THINK_TAGS):
            return _refused("answer with a think block")
        try:
            header = self._render(conversation[:-1], add_generation_prompt=True)
            whole = self._render(conversation, add_generation_prompt=False)
        except TemplateError as error:
            return _refused(f"the chat template does not take this conversation: {str(error).strip() or type(error).__name__}")
        first = _answer_offset(header, whole, answer)
        if first is None:
            return _refused("the chat template does not show where the answer begins")
        return self._span_of_text(whole, first, answer.strip())

    def _span_of_text(self, whole: str, first: int, answer: str) -> Transcript:
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        inside = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if begin < first + len(answer) and end > first]
        if not inside:
            return _refused("the answer has no token", ids)
        start, end = inside[0], inside[-1] + 1
        if self.text(ids[start:end]).strip() != answer:
            return _refused("decoding the answer's tokens does not give the answer back", ids[:end])
        return Transcript(ids[:end], start, end)

    def _without_outer_space(self, token_ids: Int32, start: int, end: int) -> tuple[int, int]:
        """Tokens of white space alone at either end are not part of the answer."""
        while start < end and not self.text(token_ids[start : start + 1]).strip():
            start += 1
        while start < end and not self.text(token_ids[end - 1 : end]).strip():
            end -= 1
        return start, end

    def _messages(self, conversation: Sequence[Message]) -> list[dict[str, str]]:
        """As the template wants them; without a system role the instruction opens the user's turn, as the published code does."""
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        if not self.has_system_role and len(messages) > 1 and messages[0]["role"] == "system":
            system, user, *rest = messages
            return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return messages

    def _render(self, conversation: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self._apply(self._messages(conversation), add_generation_prompt=add_generation_prompt)

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                chat_template=self._template,
            )
        )

    def _takes_a_system_message(self) -> bool:
        """Neither an error nor silence: some templates drop the message, and all characters would be asked the same."""
        sentinel = "a system message"
        messages = [{"role": "system", "content": sentinel}, {"role": "user", "content": "u"}]
        try:
            return sentinel in self._apply(messages, add_generation_prompt=False)
        except TemplateError:
            return False

    def _encode(self, text: str) -> Int32:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def text(self, ids: Int32) -> str:
        """The text of token ids, exactly."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def timeless(template: str) -> str:
    """The chat template, with a fixed date for the function by which it would ask for today's."""
    if "strftime_now" not in template:
        return template
    dates = {wanted: DATE.strftime(wanted) for wanted in DATE_FORMATS}
    return f"{{%- macro strftime_now(wanted) -%}}{{{{ {dates!r}.get(wanted, {DATE.isoformat()!r}) }}}}{{%- endmacro -%}}{template}"


def _answer_offset(header: str, whole: str, answer: str) -> int | None:
    """Where the answer begins in `whole`, or None if the template's two renders do not agree on it."""
    if not whole.startswith(header):
        return None
    rest = whole[len(header) :]
    first = len(header) + len(rest) - len(rest.lstrip())
    return first if whole.startswith(answer.strip(), first) else None


def _refused(reason: str, token_ids: Int32 | None = None) -> Transcript:
    return Transcript(np.empty(0, np.int32) if token_ids is None else token_ids, 0, 0, reason)
