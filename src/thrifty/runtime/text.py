"""Text to tokens and back: the tokenizer of a folder, pieces of text as they become whole, stop strings."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from thrifty.errors import ThriftyError


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer.json of a folder; None where there is none.

    Raises ThriftyError where it is malformed or has tokens that the embedding lacks. An embedding with more rows than
    the tokenizer has tokens is common (padding) and fine.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ThriftyError(f"[tokenizer] {path} cannot be read; {error}; take it from the same checkpoint") from error
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if last >= vocab_size:
        raise ThriftyError(
            f"[tokenizer] token ids must be below the model's vocabulary of {vocab_size}; {path} has id {last}; "
            "take tokenizer and weights from one checkpoint"
        )
    return tokenizer


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of `tokens`, piece by piece, each piece whole characters; what stays incomplete comes last as U+FFFD."""
    stream = DecodeStream(skip_special_tokens=True)
    seen: list[int] = []
    given = 0
    for token in tokens:
        seen.append(token)
        piece = stream.step(tokenizer, token)
        if piece:
            given += len(piece)
            yield piece
    rest = tokenizer.decode(seen, skip_special_tokens=True)[given:]
    if rest:
        yield rest


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """`pieces` up to the first of the strings `stops`, which is not given; text that may begin one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def chat_renderer(tokenizer_config: dict[str, Any], template: str | None) -> Callable[[list[dict[str, str]]], str]:
    """A function from messages ({"role", "content"}) to the prompt that asks for the assistant's next message.

    Uses the checkpoint's chat template (Jinja, as transformers renders it); without one, "Role: content" blocks.
    Raises ThriftyError where there is a template and jinja2 is not installed, or the template refuses the messages.
    """
    if template is None:
        return _plain_chat
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ThriftyError(
            "[chat] the checkpoint's chat template needs jinja2, which is not installed; pip install 'thrifty[chat]'"
        ) from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    special = {name: _token_text(tokenizer_config.get(name)) for name in ("bos_token", "eos_token", "unk_token")}

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise ThriftyError(
                f"[chat] the chat template must take the messages; {error}; correct the template"
            ) from error

    return render


def _plain_chat(messages: list[dict[str, str]]) -> str:
    blocks = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
    return "".join(blocks) + "Assistant:"


def _token_text(token: Any) -> str:
    """A special token of tokenizer_config.json: text, or transformers' record of it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
