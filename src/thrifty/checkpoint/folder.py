"""A checkpoint folder, opened and held against its own config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thrifty.checkpoint.config import DecoderConfig, parse_json, read_config, read_json
from thrifty.checkpoint.families import our_name
from thrifty.checkpoint.latent import multiplied_codes, rounded_scale, scaled_codes, transformers_factor
from thrifty.checkpoint.names import EMBEDDING, HEAD, expected_tensors
from thrifty.checkpoint.safetensors import FLOATS, Tensor, open_safetensors, read_metadata
from thrifty.errors import ThriftyError
from thrifty.spec import binary_codes, round_bf16

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: What lies beside config.json and the tensors: names, and a pattern for templates in a folder of their own.
TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "generation_config.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder whose tensors are exactly those that its config calls for, under the names they have here."""

    path: Path
    config: DecoderConfig
    tensors: dict[str, Tensor]
    #: The texts beside the tensors, by file name, where they are no files; None for those of the folder `path`.
    texts: Mapping[str, str] | None = None

    def float32(self, name: str) -> np.ndarray:
        """A tensor as a float32 copy."""
        return self.tensors[name].float32()

    def codes(self, linear: str, rows: int) -> tuple[np.ndarray, np.float32]:
        """Codes int8 [rows, in] and the scale that multiplies them, of linear `linear` ("model.layers.0....").

        Packed weights are read; latent weights are quantised by the definitions in `thrifty.spec`, with the stored
        scale where there is one. Raises ThriftyError where a scale or a code is invalid.
        """
        weight = self.tensors[f"{linear}.weight"]
        if self.config.storage == "latent" or linear == "lm_head":
            return self._quantised(linear, weight)
        codes = unpack_row_block(weight.data, rows)
        if codes is None:
            raise self.no_code(linear)
        return codes, self.multiplier(linear)

    def no_code(self, linear: str) -> ThriftyError:
        """What to raise about two bits that are no code."""
        return ThriftyError(
            f"[checkpoint] weight codes are 0, 1 and 2; '{linear}.weight' of {self.path} has 3; download it again"
        )

    def packed(self, linear: str) -> tuple[np.ndarray, np.float32] | None:
        """The stored bytes (`spec.ROW_BLOCK`) of a linear and the scale that multiplies them; None for latent weights.

        Raises ThriftyError where the scale is invalid.
        """
        if self.config.storage == "latent":
            return None
        return self.tensors[f"{linear}.weight"].data, self.multiplier(linear)

    def bias(self, linear: str) -> np.ndarray:
        """What is added to the product of a linear that has a bias, float32 [out]."""
        bias = self.float32(f"{linear}.bias")
        return bias * self.multiplier(linear) if self.config.bias_scaled else bias

    def text(self, name: str) -> str | None:
        """A text file of the folder; None where it is absent. Raises ThriftyError where it is no UTF-8."""
        if self.texts is not None:
            return self.texts.get(name)
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ThriftyError(
                f"[checkpoint] {path} must be UTF-8; byte {error.start} is not; save it again"
            ) from error

    def origin(self) -> dict[str, str]:
        """What is said of the model's name, authors, licence, ..., by the keys of GGUF ("general.author")."""
        path = self.path / _WEIGHTS
        return general_texts(read_metadata(path) if path.is_file() else {})

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where it is absent."""
        text = self.text(name)
        return {} if text is None else parse_json(self.path / name, text)

    def multiplier(self, linear: str) -> np.float32:
        """The scale that multiplies the codes of a linear. Raises ThriftyError where it is invalid."""
        if self.config.storage == "divides":
            return self._valid(linear, "weight_scale", reciprocal(self._scale(linear)))
        if self.config.storage == "multiplies" or f"{linear}.weight_scale" in self.tensors:
            return self._scale(linear)
        rounded = self.config.latent_scale == "bfloat16"
        weight = self.tensors[f"{linear}.weight"]
        scale = rounded_scale(weight) if rounded else np.float32(1) / self._factor(linear)
        return self._valid(linear, "weight", scale)

    def _quantised(self, linear: str, weight: Tensor) -> tuple[np.ndarray, np.float32]:
        if self.config.latent_scale == "float32" and f"{linear}.weight_scale" not in self.tensors:
            factor = self._factor(linear)
            return multiplied_codes(weight, factor), self._valid(linear, "weight", np.float32(1) / factor)
        scale = self.multiplier(linear)
        if self.config.linear == "binary":
            return binary_codes(weight.float32(), np).astype(np.int8), scale
        return scaled_codes(weight, scale), scale

    def _factor(self, linear: str) -> np.float32:
        """What transformers' forward multiplies a latent weight by before it rounds."""
        weights = [self.tensors[f"{linear}.weight"]]
        if self.config.fused_gate_up and linear.endswith((".gate_proj", ".up_proj")):
            block, _, name = linear.rpartition(".")
            weights.append(self.tensors[f"{block}.{'up' if name == 'gate_proj' else 'gate'}_proj.weight"])
        return transformers_factor(*weights)

    def _scale(self, linear: str) -> np.float32:
        scale = self.float32(f"{linear}.weight_scale").reshape(-1)[0]
        return self._valid(linear, "weight_scale", scale)

    def _valid(self, linear: str, tensor: str, scale: np.float32) -> np.float32:
        if not 0 < scale < np.inf:
            raise ThriftyError(
                f"[checkpoint] a weight scale must be positive and finite; that of '{linear}.{tensor}' of {self.path} "
                f"is {scale}; download or pack it again"
            )
        return scale


def open_folder(path: str | Path) -> Folder:
    """Open a folder with config.json and model.safetensors (or its shards); tensors stay in mapped pages.

    Raises ThriftyError where a file is absent or malformed, or the tensors are not those that the config calls for.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ThriftyError(f"[checkpoint] a model is a folder with config.json in it; {path} {what}; check the path")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ThriftyError(
            f"[checkpoint] a model is a folder with config.json in it; {path} is an adapter; "
            f"thrifty pack {path} merges it"
        )
    config = read_config(path / "config.json")
    tensors = _renamed(path, open_tensors(path), config)
    if config.tie_word_embeddings and HEAD in tensors:
        if _are_same(tensors[HEAD], tensors.get(EMBEDDING)):
            del tensors[HEAD]
        else:
            # As transformers, which believes the tensors.
            config = replace(config, tie_word_embeddings=False)
    check_tensors(path, tensors, config)
    return Folder(path, config, tensors)


def reciprocal(scale: np.float32) -> np.float32:
    """1 / scale: of the float32 numbers whose own reciprocal is `scale`, one that bfloat16 or float16 holds, if any.

    A scale that was stored as 1 / s in float32 so comes back as the very s; 1 / (1 / s) can miss it by a bit.
    """
    with np.errstate(over="ignore"):
        plain = np.float32(1) / scale
        short = (np.float32(round_bf16(plain)), np.float32(np.float16(plain)))
    return next((s for s in short if s != 0 and np.float32(1) / s == scale), plain)


def holds_codes(packed: np.ndarray) -> bool:
    """Whether no digit of `spec.ROW_BLOCK` bytes is 3."""
    return not (packed & (packed >> 1) & 0x55).any()


def unpack_row_block(packed: np.ndarray, rows: int) -> np.ndarray | None:
    """`spec.unpack(ROW_BLOCK, packed, rows, ...)` with one byte a code in memory; None where a digit is 3."""
    packed = np.ascontiguousarray(packed)
    if not holds_codes(packed):
        return None
    blocks = np.empty((4, *packed.shape), np.int8)
    for digit in range(4):
        np.copyto(blocks[digit], (packed >> (2 * digit)) & 3, casting="unsafe")
    blocks -= 1
    return blocks.reshape(-1, packed.shape[1])[:rows]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors, or of the shards that its index names, as they are called there."""
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return open_safetensors(folder / _WEIGHTS)
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ThriftyError(f"[checkpoint] {folder / _INDEX} must have a weight_map of names to files; save it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ThriftyError(f"[checkpoint] shards must lie in their folder; {folder / _INDEX} names '{file}'")
        tensors |= open_safetensors(folder / file)
    return tensors


def general_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Texts about a model, without what says how its file is made."""
    made = ("general.architecture", "general.type")
    return {
        key: value
        for key, value in metadata.items()
        if key.startswith("general.") and isinstance(value, str) and key not in made
    }


def _renamed(path: Path, tensors: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The tensors under the names they have here, without those that say nothing."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = our_name(config.family, name)
        if ours is None:
            continue
        if ours in renamed:
            raise _mismatch(path, f"tensor '{name}' is there under another name too")
        renamed[ours] = tensor
    return _split_gate_up(renamed, config.intermediate_size) if config.fused_gate_up else renamed


def _are_same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.data, b.data)


def _split_gate_up(tensors: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The halves of a fused projection, gate first, as the two that it stands for; they share its norm."""
    split = dict(tensors)
    for name, tensor in tensors.items():
        up = name.replace(".gate_proj.", ".up_proj.")
        if up in tensors or name == up:
            continue
        if name.endswith(".gate_proj.weight") and tensor.shape[:1] == (2 * rows,):
            split |= {name: Tensor(tensor.dtype, tensor.data[:rows]), up: Tensor(tensor.dtype, tensor.data[rows:])}
        elif name.endswith(".rms_norm.weight"):
            split[up] = tensor
    return split


class Described(Protocol):
    """What is checked of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_tensors(path: Path, tensors: Mapping[str, Described], config: DecoderConfig) -> None:
    """Raises ThriftyError where `tensors`, read from `path`, are not those that the config calls for."""
    if config.num_hidden_layers > len(tensors):
        raise _mismatch(path, f"num_hidden_layers is {config.num_hidden_layers} and there are {len(tensors)} tensors")
    expected = expected_tensors(config)
    for name, info in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            if info.required:
                raise _mismatch(path, f"tensor '{name}' is absent")
            continue
        if info.kind == "codes" and tensor.dtype != "U8":
            raise _mismatch(path, f"tensor '{name}' must be packed (U8) and is {tensor.dtype}")
        if info.kind == "float" and tensor.dtype not in FLOATS:
            raise _mismatch(path, f"tensor '{name}' must be a float and is {tensor.dtype}")
        # transformers has written scales both as [1] and as scalars.
        shapes = (info.shape, ()) if info.shape == (1,) else (info.shape,)
        if tensor.shape not in shapes:
            raise _mismatch(path, f"tensor '{name}' must have shape {list(info.shape)} and has {list(tensor.shape)}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise _mismatch(path, f"tensor '{unknown[0]}'{more} is not part of such a model")


def _mismatch(path: Path, what: str) -> ThriftyError:
    return ThriftyError(
        f"[checkpoint] tensors must match config.json; in {path}, {what}; take both files from one checkpoint"
    )
