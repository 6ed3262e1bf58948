"""Messages as the text that a model was taught to answer."""

from typing import Any

from thrifty.errors import ThriftyError

#: What ends an answer where no template teaches the model an end token.
PLAIN_CHAT_STOPS = ["\nUser:", "\nSystem:"]


def render_chat(messages: list[dict[str, str]], template: str | None, tokenizer_config: dict[str, Any]) -> str:
    """The prompt for the assistant's next message after `messages` ({"role", "content"}).

    template: a checkpoint's chat template (Jinja, rendered as transformers does), or None for "User: ..." blocks.
    tokenizer_config: where the template's special tokens come from. Raises ThriftyError where there is a template and
    jinja2 is not installed, or the template refuses the messages.
    """
    if template is None:
        blocks = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
        return "".join(blocks) + "Assistant:"
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

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    special = {name: _text(tokenizer_config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except (TemplateError, TypeError) as error:
        raise ThriftyError(f"[chat] the chat template must take the messages; {error}; correct the template") from error


def _text(token: Any) -> str:
    """A special token of tokenizer_config.json: text, or transformers' record of it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
