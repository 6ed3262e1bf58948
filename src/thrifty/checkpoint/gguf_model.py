"""A GGUF file as a checkpoint: config, tensors under the names they have here, and the texts that a folder has."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thrifty.checkpoint.config import DecoderConfig, config_of
from thrifty.checkpoint.folder import Folder, check_tensors, general_texts
from thrifty.checkpoint.gguf import GGUF, Block, open_gguf
from thrifty.checkpoint.gguf_vocabulary import tokenizer_config, tokenizer_json
from thrifty.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD, all_linears
from thrifty.checkpoint.safetensors import DTYPES, Tensor
from thrifty.checkpoint.transformers_config import CLASSES
from thrifty.errors import ThriftyError
from thrifty.spec import GGUF_TERNARY, gguf_block_scales, gguf_decode

#: Names of tensors in GGUF, and here.
NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
#: The same for parts of a layer, between `blk.N.` and `.weight` or `.bias`.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Model types by architectures, and the activation where the file names none. Those of Microsoft's fork compute ReLU².
ARCHITECTURES = {
    "bitnet": ("bitnet", "silu"),
    "bitnet-b1.58": ("bitnet", "relu2"),
    "bitnet-25": ("bitnet", "relu2"),
    "llama": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
}
#: How keys of a tokenizer begin.
VOCABULARY = ("tokenizer.", "thrifty.tokenizer_config")
#: Keys of our own: config.json and generation_config.json, and the scales that float16 does not hold.
CONFIG, GENERATION_CONFIG, SCALE = "thrifty.config", "thrifty.generation_config", "thrifty.scale."

#: `thrifty.spec.gguf_decode`, or what does the same faster.
Decode = Callable[[str, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class GGUFFolder(Folder):
    """A GGUF file read as a folder would be; low-bit weights are decoded when they are asked for."""

    blocks: Mapping[str, Block] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    decode: Decode = gguf_decode

    def codes(self, linear: str, rows: int) -> tuple[np.ndarray, np.float32]:
        """Codes int8 [rows, in] and the scale that multiplies them.

        Raises ThriftyError where a byte stands for no codes, or blocks differ in their scales.
        """
        block = self.blocks[f"{linear}.weight"]
        try:
            codes, scales = self.decode(block.kind, block.data, *block.shape)
        except ThriftyError as error:
            raise ThriftyError(f"{error}; tensor '{linear}.weight' of {self.path}") from None
        return halves(self.config, self.permuted, linear, codes), self._scale_of(linear, scales)

    def multiplier(self, linear: str) -> np.float32:
        """The scale that multiplies the codes of a linear; where blocks differ, the whole tensor is decoded for it."""
        block = self.blocks[f"{linear}.weight"]
        scales = np.unique(gguf_block_scales(block.kind, block.data))
        # Every page has one.
        self.tensors[f"{linear}.weight"].release()
        scales = scales[scales > 0]
        return self._scale_of(linear, scales) if len(scales) == 1 else self.codes(linear, block.shape[0])[1]

    def origin(self) -> dict[str, str]:
        """Texts of the metadata about the model."""
        return general_texts(self.metadata)

    def vocabulary(self) -> dict[str, Any] | None:
        """The metadata of the tokenizer; None where there is none."""
        found = {key: value for key, value in self.metadata.items() if key.startswith(VOCABULARY)}
        return found if "tokenizer.ggml.model" in found else None

    def packed(self, linear: str) -> None:
        """None: a row is not stored as `spec.ROW_BLOCK` has it."""

    @property
    def permuted(self) -> bool:
        """Whether rotary pairs are neighbours, as architecture `llama` has them, and not halves of a head."""
        return self.metadata["general.architecture"] == "llama"

    def _scale_of(self, linear: str, scales: np.ndarray) -> np.float32:
        if len(scales) > 1:
            raise ThriftyError(
                f"[gguf] the blocks of a ternary tensor must have one scale; '{linear}.weight' of {self.path} has "
                f"{len(scales)}: it was quantised from weights that are not ternary; convert the original instead"
            )
        stored = scales[0] if len(scales) else None
        exact = self.metadata.get(f"{SCALE}{linear}")
        if exact is None:
            # All codes are zero where there is none.
            return np.float32(1) if stored is None else np.float32(stored)
        sound = type(exact) is np.float32 and 0 < exact < np.inf
        if not sound or stored not in (None, exact, np.float16(exact)):
            raise ThriftyError(
                f"[gguf] '{SCALE}{linear}' must be the float32 that the scale of the tensor was rounded from; "
                f"{self.path} has {exact} and {stored}; convert the model again"
            )
        return exact


def halves(config: DecoderConfig, permuted: bool, linear: str, rows: np.ndarray) -> np.ndarray:
    """Rows of a projection to heads with rotary pairs as halves of a head, where they are neighbours."""
    heads = _heads(config, permuted, linear)
    return rows if heads is None else rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def neighbours(config: DecoderConfig, permuted: bool, linear: str, rows: np.ndarray) -> np.ndarray:
    """The inverse of `halves`."""
    heads = _heads(config, permuted, linear)
    return rows if heads is None else rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def open_gguf_model(path: str | Path, decode: Decode = gguf_decode) -> GGUFFolder:
    """A GGUF file as a checkpoint; tensors stay in mapped pages, and `decode` reads the low-bit ones.

    Raises ThriftyError where the file is malformed, its architecture is not read here, or its tensors are not those
    that its metadata call for.
    """
    file = open_gguf(path)
    blocks, fields, config = _read(file)
    permuted = file.metadata["general.architecture"] == "llama"
    tensors = {name: _tensor(config, permuted, name, block) for name, block in blocks.items()}
    return GGUFFolder(file.path, config, tensors, _Texts(file, fields), blocks, file.metadata, decode)


def gguf_config(file: GGUF) -> DecoderConfig:
    """The config of a file. Raises ThriftyError as `open_gguf_model` does."""
    return _read(file)[2]


def _read(file: GGUF) -> tuple[dict[str, Block], dict[str, Any], DecoderConfig]:
    """Tensors under the names they have here, config.json and config."""
    blocks = dict(_renamed(file))
    fields = _fields(file, blocks)
    config = replace(config_of(file.path, fields), bias_scaled=False)
    _check(file.path, blocks, config)
    return blocks, fields, config


def _check(path: Path, blocks: Mapping[str, Block], config: DecoderConfig) -> None:
    """Raises ThriftyError where the tensors are not those of the config, or some of its linears are ternary only."""
    described = {name: _Described(_float_name(block.kind), block.shape) for name, block in blocks.items()}
    check_tensors(path, described, replace(config, linear="dense"))
    linears = {f"{linear}.weight" for linear in all_linears(config)}
    for name, block in blocks.items():
        ternary = block.kind in GGUF_TERNARY
        if ternary and name not in linears:
            raise ThriftyError(
                f"[gguf] no tensors but the linears of layers are ternary; '{name}' of {path} is {block.kind}; take a "
                "file whose embedding and head have 8 bits or more"
            )
        if not ternary and name in linears and config.linear == "ternary":
            raise ThriftyError(
                f"[gguf] linears must all be ternary or all dense; '{name}' of {path} is {block.kind} and others are "
                "ternary; convert the original again"
            )


class _Described(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _float_name(kind: str) -> str:
    return kind if kind in DTYPES else "F32"


def _heads(config: DecoderConfig, permuted: bool, linear: str) -> int | None:
    if not permuted:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(linear.rpartition(".")[2])


def _renamed(file: GGUF) -> Iterator[tuple[str, Block]]:
    for name, block in file.tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name in NAMES:
            yield NAMES[name], block
        elif match and match[2] in LAYER_NAMES:
            yield f"model.layers.{int(match[1])}.{LAYER_NAMES[match[2]]}.{match[3]}", block
        else:
            raise ThriftyError(
                f"[gguf] a decoder read here has no tensor '{name}'; {file.path} has it; run it with llama.cpp"
            )


def _fields(file: GGUF, blocks: Mapping[str, Block]) -> dict[str, Any]:
    """config.json of the model: what the metadata say, over the one that the file was made from."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ThriftyError(
            f"[gguf] architectures read here are {', '.join(ARCHITECTURES)}; {file.path} has {architecture!r}; run it "
            "with llama.cpp"
        )
    model_type, activation = ARCHITECTURES[architecture]
    reader = _Metadata(file, architecture)
    if EMBEDDING not in blocks or len(blocks[EMBEDDING].shape) != 2:
        raise ThriftyError(f"[gguf] a decoder has a matrix 'token_embd.weight'; {file.path} has none; get it again")
    ternary = any(block.kind in GGUF_TERNARY for block in blocks.values())
    scaling = reader.text("rope.scaling.type", "none")
    if scaling not in ("none", "linear") or reader.number("rope.scaling.factor", 1.0) != 1:
        raise ThriftyError(f"[gguf] rotary positions are read unscaled; {file.path} scales them ({scaling})")
    stored = _stored(file, CONFIG)
    if stored.get("model_type") == "mistral" and model_type == "llama":
        model_type = "mistral"
    fields = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": blocks[EMBEDDING].shape[0],
        "hidden_size": reader.number("embedding_length"),
        "intermediate_size": reader.number("feed_forward_length"),
        "num_hidden_layers": reader.number("block_count"),
        "num_attention_heads": reader.number("attention.head_count"),
        "num_key_value_heads": reader.number("attention.head_count_kv", reader.number("attention.head_count")),
        "hidden_act": reader.text("hidden_activation", activation),
        "max_position_embeddings": reader.number("context_length"),
        "rms_norm_eps": _shortest(reader.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _shortest(reader.number("rope.freq_base", np.float32(10_000))),
        },
        "tie_word_embeddings": HEAD not in blocks,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in blocks,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in blocks,
    }
    head_dim = reader.number("attention.key_length", None)
    if head_dim is not None:
        fields["head_dim"] = head_dim
    reader.refuse_others(head_dim, fields)
    if ternary:
        fields["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    return stored | fields


def _shortest(value: Any) -> Any:
    """The shortest decimal of a float32: 1e-5, not 9.99999974e-06."""
    return float(str(value)) if type(value) is np.float32 else value


def _stored(file: GGUF, key: str) -> dict[str, Any]:
    text = file.metadata.get(key)
    try:
        content = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ThriftyError(f"[gguf] '{key}' must be a JSON object; {file.path} has another text; convert it again")
    return content


def _tensor(config: DecoderConfig, permuted: bool, name: str, block: Block) -> Tensor:
    """A tensor as the runtime takes it; a low-bit one is its bytes."""
    if block.kind in GGUF_TERNARY:
        return Tensor(block.kind, block.data)
    # A row of Q8_0 is its bytes.
    shape = block.shape if block.kind in DTYPES else (*block.shape[:-1], -1)
    values = block.data.view(DTYPES.get(block.kind, np.uint8)).reshape(shape)
    return Tensor(block.kind, halves(config, permuted, name.rpartition(".")[0], values))


class _Metadata:
    """Values of an architecture, checked one by one so that an error names the key."""

    def __init__(self, file: GGUF, architecture: str) -> None:
        self._file, self._architecture = file, architecture

    def number(self, name: str, *default: Any) -> Any:
        """A number, whole ones as int."""
        value = self._value(name, default)
        if (value is not None and not isinstance(value, np.number | int | float)) or isinstance(value, bool):
            raise self._error(name, f"a number; got {type(value).__name__}")
        return int(value) if isinstance(value, np.integer) else value

    def text(self, name: str, *default: str) -> str:
        """A text."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._error(name, f"a text; got {type(value).__name__}")
        return value

    def refuse_others(self, head_dim: int | None, fields: Mapping[str, Any]) -> None:
        """Raises ThriftyError for a value that would change what is computed, and is not read."""
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        width = head_dim if head_dim is not None else hidden // heads if isinstance(heads, int) and heads else None
        neutral = {
            "rope.dimension_count": width,
            "attention.value_length": width,
            "attention.causal": True,
            "attention.scale": 0,
            "rope.scale_linear": 1,
            "logit_scale": 1,
            "residual_scale": 1,
            "embedding_scale": 1,
            "expert_count": 0,
            "attention.sliding_window": 0,
        }
        for name, value in neutral.items():
            given = self._file.metadata.get(f"{self._architecture}.{name}")
            window = name == "attention.sliding_window" and given == fields["max_position_embeddings"]
            if given is not None and not window and (not np.isscalar(given) or given != value):
                raise self._error(name, f"absent or {value}, as nothing else is computed here; got {given}")

    def _value(self, name: str, default: tuple[Any, ...]) -> Any:
        value = self._file.metadata.get(f"{self._architecture}.{name}", *default[:1])
        if value is None and not default:
            raise self._error(name, "there")
        return value

    def _error(self, name: str, rule: str) -> ThriftyError:
        key = f"{self._architecture}.{name}"
        return ThriftyError(f"[gguf] '{key}' must be {rule}; {self._file.path}; convert or download it again")


class _Texts(Mapping[str, str]):
    """The texts that a folder would have, made when they are asked for: a vocabulary takes a moment."""

    def __init__(self, file: GGUF, fields: dict[str, Any]) -> None:
        metadata = file.metadata
        self._makes: dict[str, Callable[[], str | None]] = {
            "config.json": lambda: json.dumps(fields),
            "generation_config.json": lambda: json.dumps(_stored(file, GENERATION_CONFIG) or _ends(metadata)),
            "tokenizer.json": lambda: tokenizer_json(metadata),
            "tokenizer_config.json": lambda: json.dumps(tokenizer_config(metadata), ensure_ascii=False),
        }
        self._made: dict[str, str | None] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if key in self._makes and key not in self._made:
            self._made[key] = self._makes[key]()
        text = self._made.get(key)
        return default if text is None else text

    def __getitem__(self, key: str) -> str:
        text = self.get(key)
        if text is None:
            raise KeyError(key)
        return text

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._makes if self.get(key) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _ends(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json by the special tokens of a vocabulary."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    found = {name: int(token) for name, token in ids.items() if isinstance(token, np.integer)}
    ends = sorted({found[name] for name in ("eos", "eot", "eom") if name in found})
    return {"bos_token_id": found.get("bos"), "eos_token_id": ends or None}
