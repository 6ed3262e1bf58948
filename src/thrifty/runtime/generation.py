"""How the next token is chosen, and when to stop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thrifty.checkpoint import Folder
from thrifty.errors import ThriftyError
from thrifty.spec import penalize_repetition, sample

#: New tokens where neither the caller nor generation_config.json says.
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; temperature 0 takes the most likely."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0, and finite"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000 (1 penalises nothing)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ThriftyError(f"[generate] {name} must be {rule}; got {getattr(self, name)}")

    def choose(self, logits: np.ndarray, seen: Sequence[int], rng: np.random.Generator) -> int:
        """The next token after those `seen`."""
        if self.repetition_penalty != 1:
            logits = penalize_repetition(logits, np.asarray(seen), self.repetition_penalty)
        if self.temperature == 0 or not 0 < self.top_k < len(logits):
            return sample(logits, rng, self.temperature, self.top_k, self.top_p)
        # Sorting a vocabulary takes longer than a step of a small model; the k largest, in order of id, are enough.
        least = np.partition(logits, -self.top_k)[-self.top_k]
        kept = np.flatnonzero(logits >= least)
        return int(kept[sample(logits[kept], rng, self.temperature, self.top_k, self.top_p)])


class Continuation:
    """A prompt and the tokens chosen after it."""

    def __init__(
        self, prompt: list[int], count: int, sampling: Sampling, rng: np.random.Generator, stops: frozenset[int]
    ) -> None:
        """count: most tokens to choose; stops: tokens that end it and are left out."""
        self.seen = list(prompt)
        self.made: list[int] = []
        self.count = count
        self.finished = count == 0
        #: Whether the text is over with a token, for another reason than `stops`.
        self.ends: Callable[[int], bool] = lambda _: False
        self._sampling, self._rng, self._stops = sampling, rng, stops

    def take(self, logits: np.ndarray) -> int | None:
        """Choose the next token by the logits after the last one; None where it ends the text."""
        token = self._sampling.choose(logits, self.seen, self._rng)
        if token in self._stops:
            self.finished = True
            return None
        self.seen.append(token)
        self.made.append(token)
        self.finished = len(self.made) == self.count or self.ends(token)
        return token


@dataclass(frozen=True)
class Defaults:
    """What generation_config.json (and config.json) say where a caller says nothing."""

    sampling: Sampling
    max_new_tokens: int
    bos: int | None
    eos: frozenset[int]

    @classmethod
    def read(cls, folder: Folder) -> "Defaults":
        """From generation_config.json, then config.json, of a folder. A model that is not said to sample is greedy.

        Raises ThriftyError where a field is no such thing.
        """
        name = "generation_config.json"
        fields = folder.json("config.json") | {k: v for k, v in folder.json(name).items() if v is not None}
        try:
            return cls._of(fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise ThriftyError(
                f"[checkpoint] {folder.path / name} must hold numbers that generation can use; {error}; correct it"
            ) from error

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> "Defaults":
        bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if any(type(token) is not int for token in [*ends, 0 if bos is None else bos]):
            raise TypeError(f"bos_token_id and eos_token_id are token ids; got {bos!r} and {eos!r}")
        count = int(fields.get("max_new_tokens", MAX_NEW_TOKENS))
        if count < 0:
            raise ValueError(f"max_new_tokens must be at least 0; got {count}")
        return cls(
            sampling=Sampling(
                temperature=float(fields.get("temperature", 1.0)) if fields.get("do_sample") else 0.0,
                top_k=int(fields.get("top_k", 0)),
                top_p=float(fields.get("top_p", 1.0)),
                repetition_penalty=float(fields.get("repetition_penalty", 1.0)),
            ),
            max_new_tokens=count,
            bos=bos,
            eos=frozenset(ends),
        )
