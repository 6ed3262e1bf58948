"""How the next token is chosen, and when to stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 penalises nothing)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ThriftyError(f"[generate] {name} must be {rule}; got {getattr(self, name)}")

    def choose(self, logits: np.ndarray, seen: Sequence[int], rng: np.random.Generator) -> int:
        """The next token after those `seen`."""
        if self.repetition_penalty != 1:
            logits = penalize_repetition(logits, np.asarray(seen), self.repetition_penalty)
        return sample(logits, rng, self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Defaults:
    """What generation_config.json (and config.json) say where a caller says nothing."""

    sampling: Sampling
    max_new_tokens: int
    bos: int | None
    eos: frozenset[int]

    @classmethod
    def read(cls, generation: dict[str, Any], config: dict[str, Any]) -> "Defaults":
        """From the two files' contents; the first goes before the second. A model that does not sample is greedy."""

        def given(name: str, default: Any) -> Any:
            value = generation.get(name)
            return default if value is None else value

        eos = given("eos_token_id", config.get("eos_token_id"))
        bos = given("bos_token_id", config.get("bos_token_id"))
        sampling = Sampling(
            temperature=float(given("temperature", 1.0)) if given("do_sample", False) else 0.0,
            top_k=int(given("top_k", 0)),
            top_p=float(given("top_p", 1.0)),
            repetition_penalty=float(given("repetition_penalty", 1.0)),
        )
        return cls(
            sampling=sampling,
            max_new_tokens=int(given("max_new_tokens", MAX_NEW_TOKENS)),
            bos=bos if isinstance(bos, int) else None,
            eos=frozenset([eos] if isinstance(eos, int) else eos or []),
        )
