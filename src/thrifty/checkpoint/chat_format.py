"""How the models trained here mark the turns of a chat: one text for the trainer that writes it and the runtime."""

from collections.abc import Iterable

#: Between documents, before the first token of a text, and at the end of an answer.
END = "<|endoftext|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
#: A turn is its role's token, a line break, the content and the end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def chat_text(messages: Iterable[dict[str, str]]) -> str:
    """What `CHAT_TEMPLATE` makes of `messages` ({"role", "content"}), asking for an answer; needs no jinja2."""
    turns = (
        f"<|{message['role']}|>\n{message['content']}{END if message['role'] == 'assistant' else ''}\n"
        for message in messages
    )
    return "".join(turns) + f"{ASSISTANT}\n"
