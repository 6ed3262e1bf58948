"""A chat: messages, and a cache that keeps what the turns share."""

from collections.abc import Generator, Iterator
from pathlib import Path

from thrifty.runtime.runtime import Runtime


class Conversation:
    """Messages with a model. What a turn's prompt shares with the turn before is not computed again."""

    def __init__(
        self, runtime: Runtime, system: str | None = None, prompt_cache: str | Path | None = None, **options
    ) -> None:
        """system: a first message that sets the tone; prompt_cache: a file, as in `Runtime.stream_tokens`, that the
        first answer of a conversation uses and makes; options: those of `Runtime.stream_tokens`."""
        self._runtime = runtime
        self._system = system
        self._prompt_cache = prompt_cache
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forget every message but the system's."""
        self.messages: list[dict[str, str]] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})
        #: Whether the last answer ended where the context did.
        self.full = False
        self._cache = self._runtime.new_cache()

    def ask(self, text: str) -> Generator[str, None, None]:
        """The model's answer to `text`, in pieces. The answer, or what there is of it when the iterator is closed, is
        kept as a message. Raises ThriftyError, and keeps nothing, where the conversation exceeds the context."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt, stops = self._runtime.chat_prompt(asked)
        file = None if len(self._cache) else self._prompt_cache
        tokens = self._runtime.stream_tokens(prompt, cache=self._cache, prompt_cache=file, **self._options)
        self.full = False
        return self._answer(asked, self._runtime.text_of(self._counted(tokens, self._runtime.room(prompt)), stops))

    def _answer(self, asked: list[dict[str, str]], stream: Iterator[str]) -> Generator[str, None, None]:
        answer = ""
        try:
            for piece in stream:
                answer += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer.strip()}]

    def _counted(self, tokens: Iterator[int], room: int) -> Iterator[int]:
        for count, token in enumerate(tokens, 1):
            self.full = count == room
            yield token
