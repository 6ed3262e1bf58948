"""The BitNet seed's inference class, over the runtime."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from thrifty import native, spec
from thrifty.checkpoint import DecoderConfig, Folder, Tensor
from thrifty.checkpoint.families import FAMILIES
from thrifty.checkpoint.folder import check_tensors
from thrifty.checkpoint.names import EMBEDDING
from thrifty.errors import ThriftyError
from thrifty.runtime.decoder import make_decoder
from thrifty.runtime.generation import Defaults, Sampling
from thrifty.runtime.runtime import Runtime, load

#: Positions of a `BitNetTransformer` unless told otherwise; its state dict does not say.
_MAX_POSITIONS = 2048
#: Share of the vocabulary that the seed samples from.
_KEPT = 0.1


class BitNetInference:
    """`load_model(path)`, then `generate(text, length)`: the continuation, `length` tokens sampled as the seed does."""

    def __init__(self, device: str = "cpu") -> None:
        """device: "cpu"; the runtime has no other yet."""
        if str(device) != "cpu":
            raise ThriftyError(f"[BitNetInference] the runtime is on the CPU; got device {device!r}; leave it out")
        self._runtime: Runtime | None = None

    def load_model(self, path: str | Path, dim_head: int = 64) -> None:
        """Load a packed (or latent) folder, or a `.pth` file: the state dict of a `thrifty.models.BitNetTransformer`.

        A `.pth` needs torch and is read with `weights_only=True`. Its sizes are those of its tensors; `dim_head` is the
        one that no tensor tells. Its tokens are bytes, and so are those of a folder that such a transformer was saved
        to without a tokenizer. Raises ThriftyError where the file is no such model.
        """
        path = Path(path)
        self._runtime = _load_folder(path) if path.is_dir() else _load_state_dict(path, dim_head)

    def generate(self, input_str: str, length: int, *, seed: int | None = None) -> str:
        """The continuation of `input_str`, `length` tokens drawn from the most likely tenth of the vocabulary.

        Text and continuation may exceed the model's context: it then goes on from the last half of the context, read
        anew, each time the context is full. A longer `input_str` is read from its last tokens that fit.
        """
        if self._runtime is None:
            raise ThriftyError("[BitNetInference] generate needs a model; call load_model first")
        tokens = _sliding(self._runtime, self._runtime.encode(input_str), length, np.random.default_rng(seed))
        return "".join(self._runtime.text_of(tokens))


def _sliding(runtime: Runtime, prompt: list[int], length: int, rng: np.random.Generator) -> Iterator[int]:
    """`length` tokens after `prompt`, each seeing at least half a context where there is one."""
    context = runtime.max_context
    window = prompt[-context:]
    while True:
        # The last token is returned, not read; an empty prompt begins with a token that the model names.
        count = min(length, context - max(1, len(window)) + 1)
        tokens = runtime.stream_tokens(
            window,
            max_new_tokens=count,
            temperature=1.0,
            top_k=max(1, int(_KEPT * runtime.config.vocab_size)),
            top_p=1.0,
            repetition_penalty=1.0,
            ignore_eos=True,
            seed=rng,
        )
        for token in tokens:
            window.append(token)
            yield token
        length -= count
        if length <= 0:
            return
        window = window[-max(1, context // 2) :]


def _load_folder(path: Path) -> Runtime:
    runtime = load(path)
    config = runtime.config
    of_the_transformer = (config.feed_forward, config.norm_placement, config.linear) == ("mlp", "pre", "ternary")
    if runtime.tokenizer is None and of_the_transformer and config.vocab_size >= 256:
        runtime.tokenizer = byte_tokenizer()
    return runtime


def _load_state_dict(path: Path, dim_head: int) -> Runtime:
    tensors = _read_state_dict(path)
    config = _infer_config(path, tensors, dim_head)
    if config.vocab_size < 256:
        raise _not_a_model(path, f"tokens are bytes, and its vocabulary is {config.vocab_size}")
    check_tensors(path, tensors, config)
    decoder = make_decoder(
        Folder(path, config, tensors), "auto", native.default_threads(), config.max_position_embeddings, cache_bits=32
    )
    defaults = Defaults(Sampling(), max_new_tokens=256, bos=None, eos=frozenset())
    return Runtime(decoder, byte_tokenizer(), defaults, Folder(path, config, {}))


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict, and the scales of its ternary layers as torch computes them in training."""
    if not path.is_file():
        raise ThriftyError(f"[BitNetInference] a model is a packed folder or a .pth file; {path} does not exist")
    try:
        import torch
    except ImportError:
        raise ThriftyError(
            f"[BitNetInference] a .pth file needs torch, which is not installed; pip install 'thrifty[torch]', or pack "
            f"the model of {path} into a folder where torch is"
        ) from None
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _not_a_model(path, first) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _not_a_model(path, "it holds something else")
    tensors = {}
    for name, value in state.items():
        weight = value.detach().float()
        tensors[name] = Tensor.of(weight.numpy())
        if re.fullmatch(r".*_proj\.weight", name):
            scale = spec.absmean(weight, torch, lambda x: x.to(torch.bfloat16).float())
            tensors[f"{name}_scale"] = Tensor.of(scale.reshape(1).numpy(), "BF16")
    return tensors


def _infer_config(path: Path, tensors: dict[str, Tensor], dim_head: int) -> DecoderConfig:
    """The configuration of a `thrifty.models.BitNetTransformer` with these tensors."""
    first = "model.layers.0."
    wanted = (EMBEDDING, f"{first}self_attn.q_proj.weight", f"{first}mlp.up_proj.weight")
    if any(name not in tensors or len(tensors[name].shape) != 2 for name in wanted):
        raise _not_a_model(path, "its tensors have other names or shapes")
    (vocab_size, hidden), (q_size, _), (inner, _) = (tensors[name].data.shape for name in wanted)
    if dim_head < 2 or dim_head % 2 or q_size % dim_head:
        raise ThriftyError(
            f"[BitNetInference] dim_head must be even and divide the {q_size} features of the queries in {path}; got "
            f"{dim_head}; pass the one the model was made with"
        )
    layers = {match[1] for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=q_size // dim_head,
        num_key_value_heads=q_size // dim_head,
        head_dim=dim_head,
        hidden_act="gelu",
        max_position_embeddings=_MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_theta=FAMILIES["thrifty"].rope_theta,
        tie_word_embeddings=False,
        attention_bias=False,
        feed_forward="mlp",
        linear="ternary",
        norm_placement="pre",
        storage="latent",
    )


def byte_tokenizer() -> Tokenizer:
    """Token b is the byte b of the text in UTF-8."""
    # Byte-level tokenizers write a byte that prints as itself, and the others as the characters from 256 on, in order.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(range(256, 512))
    characters = [chr(b) if chr(b) in alphabet else chr(next(others)) for b in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={character: b for b, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _not_a_model(path: Path, reason: str) -> ThriftyError:
    return ThriftyError(
        f"[BitNetInference] a .pth file must be the state dict of a thrifty BitNetTransformer; {path}: {reason}; save "
        "model.state_dict()"
    )
