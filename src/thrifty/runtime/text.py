"""Text to tokens and back: the tokenizer of a folder, pieces of text as they become whole, stop strings."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from thrifty.checkpoint import Folder
from thrifty.checkpoint.gguf_vocabulary import UnreadVocabularyError
from thrifty.errors import ThriftyError


def read_tokenizer(folder: Folder) -> Tokenizer | None:
    """The tokenizer.json of a folder; None where there is none, or a vocabulary of a kind that is not read here.

    Raises ThriftyError where it is malformed or has tokens that the embedding lacks. An embedding with more rows than
    the tokenizer has tokens is common (padding) and fine.
    """
    path, vocab_size = folder.path / "tokenizer.json", folder.config.vocab_size
    try:
        text = folder.text("tokenizer.json")
    except UnreadVocabularyError:
        return None
    if text is None:
        return None
    try:
        tokenizer = Tokenizer.from_str(text)
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


class Ending:
    """Whether the text of tokens, given one by one, has come to one of the strings `stops`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text = ""

    def __call__(self, token: int) -> bool:
        self._text += self._stream.step(self._tokenizer, token) or ""
        if any(stop in self._text for stop in self._stops):
            return True
        # What is left may begin a stop string that later tokens complete.
        self._text = self._text[-max(map(len, self._stops)) :]
        return False


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """`pieces` up to the first complete string of `stops`, which is not given; what may begin one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in stops if stop in held]
        if found:
            _, start = min(found)
            if start:
                yield held[:start]
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
