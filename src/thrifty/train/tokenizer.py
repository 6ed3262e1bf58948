"""Tokenizers: trained on the text (plain bytes, or byte pairs merged by what it repeats), or given."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from thrifty.checkpoint import atomic_file
from thrifty.checkpoint.chat_format import ASSISTANT, CHAT_TEMPLATE, END, SYSTEM, USER
from thrifty.checkpoint.config import read_json
from thrifty.checkpoint.folder import TEXT_FILES
from thrifty.errors import ThriftyError

SPECIALS = (END, SYSTEM, USER, ASSISTANT)
#: Pieces that a byte-level vocabulary cannot do without.
SMALLEST = 256 + len(SPECIALS)
#: What ends a text where a tokenizer does not say, the first that it has.
ENDS = (END, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer whose ids decode to exactly the text they came from.

    `vocab_size` counts the 256 bytes and the special tokens; what remains is for merges, so that the smallest size is
    plain bytes. A small text may give fewer merges than asked for.
    """
    if vocab_size < SMALLEST:
        rule = f"[tokenizer] a vocabulary has at least {SMALLEST} pieces (256 bytes, {len(SPECIALS)} special tokens)"
        raise ThriftyError(f"{rule}; got {vocab_size}; give {SMALLEST} for plain bytes")
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's cut into words, which every reader of GGUF files knows.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that transformers and chat read."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    with atomic_file(folder / "tokenizer.json", "w") as file:
        file.write(tokenizer.to_str(pretty=True))
    with atomic_file(folder / "tokenizer_config.json", "w") as file:
        file.write(json.dumps(config, indent=2) + "\n")


def open_tokenizer(given: str | Path) -> tuple[Tokenizer, Path, int]:
    """A tokenizer by its folder, its tokenizer.json or its hub id; with that folder, and the token that ends a text.

    The end is the `eos_token` of tokenizer_config.json, or else the first of `ENDS` that there is.
    Raises ThriftyError where there is no such tokenizer, it cannot be read, or has no end.
    """
    path = Path(given).expanduser()
    folder = path if path.is_dir() else path.parent if path.is_file() else _fetched(str(given))
    file = path if path.is_file() else folder / "tokenizer.json"
    tokenizer = read_tokenizer(file)
    config = folder / "tokenizer_config.json"
    end: Any = read_json(config).get("eos_token") if config.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    found = (tokenizer.token_to_id(token) for token in (end, *ENDS) if isinstance(token, str))
    last = next((token for token in found if token is not None), None)
    if last is None:
        rule = f"[tokenizer] a tokenizer must have a token that ends a text; {file} has none"
        raise ThriftyError(f"{rule}; name it as eos_token in {config.name}")
    return tokenizer, folder, last


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises ThriftyError where it is none."""
    if not file.is_file():
        rule = f"[tokenizer] a tokenizer that is given must be a tokenizer.json; {file.parent} has none"
        raise ThriftyError(f"{rule}; copy that of the model into the folder")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as problem:  # what tokenizers raises has no class of its own
        raise ThriftyError(f"[tokenizer] {file} must be a tokenizer; {problem}; get it again") from problem


def check_pieces(tokenizer: Tokenizer, name: object, pieces: int) -> None:
    """Raises ThriftyError where a tokenizer has ids that a model of so many pieces has not."""
    most = max(tokenizer.get_vocab().values(), default=-1)
    if most >= pieces:
        rule = f"[tokenizer] ids must be below the model's {pieces} pieces; {name} has ids up to {most}"
        raise ThriftyError(f"{rule}; take the tokenizer of the same checkpoint")


def _fetched(name: str) -> Path:
    """The folder of the texts of a hub id, owner/name."""
    from huggingface_hub import snapshot_download

    rule = f"[tokenizer] a tokenizer must be bpe, bytes, a folder, a tokenizer.json or a hub id; got {name}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ThriftyError(f"{rule}, which does not exist; check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=list(TEXT_FILES)))
    except Exception as problem:  # what a connection raises depends on the version of the hub's client
        reason = " ".join(str(problem).split())[:200]
        raise ThriftyError(f"{rule} ({reason}); check the path") from problem


def tokenizer_json(texts: Iterable[str], vocab_size: int, run: Path | None) -> str:
    """The tokenizer that the folder of a run holds, or else one of the texts, as JSON."""
    if run is not None and (run / "tokenizer.json").exists():
        return (run / "tokenizer.json").read_text(encoding="utf-8")
    return train_tokenizer(texts, vocab_size).to_str()
