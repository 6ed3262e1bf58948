"""Messages as the text that a model was taught to answer."""

import json
from datetime import datetime
from typing import Any

from thrifty.checkpoint.chat_format import CHAT_TEMPLATE, chat_text
from thrifty.errors import ThriftyError

#: What ends an answer where no template teaches the model an end token.
PLAIN_CHAT_STOPS = ["\nUser:", "\nSystem:"]


def chosen_template(template: Any) -> str | None:
    """The text of a `chat_template` field: a text, or the one named "default" of a list; None where there is none.

    Raises ThriftyError where a list has no such template.
    """
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        if not isinstance(named.get("default"), str):
            got = ", ".join(named) or "none"
            raise ThriftyError(f"[chat] of several chat templates one must be named 'default'; got {got}; rename one")
        template = named["default"]
    return template if isinstance(template, str) else None


def render_chat(messages: list[dict[str, str]], template: str | None, tokenizer_config: dict[str, Any]) -> str:
    """The prompt for the assistant's next message after `messages` ({"role", "content"}).

    template: a checkpoint's chat template, or None for "User: ..." blocks. The template of models trained here needs
    nothing; others are Jinja with the names that transformers gives them (special tokens, `raise_exception`,
    `strftime_now`, `tojson`, loop controls), without tools, documents and its `generation` block. tokenizer_config:
    where the special tokens come from. Raises ThriftyError where jinja2 is needed and not installed, or the template
    does not take the messages.
    """
    if template is None:
        blocks = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
        return "".join(blocks) + "Assistant:"
    if template == CHAT_TEMPLATE:
        return chat_text(messages)
    environment = _environment()
    special = {name: _text(tokenizer_config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except Exception as error:  # a template is a program: it may raise anything
        what = str(error) or type(error).__name__
        raise ThriftyError(f"[chat] the chat template must take the messages; {what}; correct the template") from error


def _environment() -> Any:
    """What a template may use."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ThriftyError(
            "[chat] the checkpoint's chat template needs jinja2, which is not installed; pip install 'thrifty[chat]'"
        ) from None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


def _text(token: Any) -> str:
    """A special token of tokenizer_config.json: text, or transformers' record of it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
