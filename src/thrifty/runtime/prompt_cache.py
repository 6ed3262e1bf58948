"""What the layers keep of a prompt in a file, so that another process need not compute them."""

import hashlib
from pathlib import Path

import numpy as np

from thrifty.checkpoint import Folder, Tensor, save_safetensors
from thrifty.checkpoint.safetensors import open_safetensors, read_metadata
from thrifty.errors import ThriftyError
from thrifty.runtime.cache import Cache, usable_prefix

_FORMAT = "thrifty prompt cache 1"
_BITS = {"F32": 32, "F16": 16, "I8": 8}
#: Bytes up to which a tensor goes into a model's digest whole; of a larger one, this many pieces of this size.
_WHOLE_BYTES, _PIECES, _PIECE_BYTES = 1 << 16, 16, 4096


class PromptCache:
    """A .safetensors file: `tokens` int32 [T] and their `keys` and `values` [layers, kv_heads, T, head_dim] as the
    cache stores them (int8 with `key_scales` and `value_scales` float32 [layers, kv_heads, T]), and what else
    `Layout.arrays` has. Its metadata name the model by `model_digest`.

    States are of all tokens of the file: it serves prompts that begin with all of them and go on."""

    def __init__(self, path: str | Path, folder: Folder, cache: Cache) -> None:
        """Open a file, or get ready to make one where it is missing.

        cache: one of the runtime's. Raises ThriftyError where the file is truncated or something else, or
        belongs to another model or to other cache bits, or there is no folder for it.
        """
        self.path = Path(path)
        self._model, self._dtype = model_digest(folder), cache.layout.dtype
        #: The tokens of the file; empty where there is none yet.
        self.tokens: list[int] = []
        self._arrays: dict[str, np.ndarray] = {}
        if self.path.exists():
            self._open(cache)
        elif not self.path.absolute().parent.is_dir():
            raise self._refusal("lie in a folder that exists", f"there is no {self.path.parent}", "make the folder")

    def restore(self, cache: Cache, tokens: list[int]) -> None:
        """Take over what `tokens` and the file begin with alike, where the cache has not as much already."""
        shared = usable_prefix(cache.layout, self.tokens, tokens)
        if shared > usable_prefix(cache.layout, cache.tokens, tokens):
            arrays = self._arrays
            if shared < len(self.tokens):
                arrays = {name: array[:, :, :shared] for name, array in arrays.items()}
            cache.restore(tokens[:shared], arrays)

    def save(self, cache: Cache, count: int) -> None:
        """Write the first `count` positions of a cache in place of the file, atomically."""
        arrays = cache.arrays(count)
        self.tokens = cache.tokens[:count]
        tensors = {"tokens": np.array(self.tokens, np.int32)}
        # Wide types first, so that each is aligned in the file.
        tensors |= dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
        metadata = {"format": _FORMAT, "model": self._model, "cache_bits": str(_BITS[self._dtype])}
        save_safetensors(self.path, {name: Tensor.of(array) for name, array in tensors.items()}, metadata)
        self._arrays = arrays

    def _open(self, cache: Cache) -> None:
        try:
            tensors, metadata = open_safetensors(self.path), read_metadata(self.path)
        except ThriftyError as error:
            raise self._refusal("be a whole prompt cache", "it is cut short, or something else") from error
        if metadata.get("format") != _FORMAT:
            raise self._refusal("be a prompt cache", "it is another file", "choose another name")
        if metadata.get("model") != self._model:
            raise self._refusal("be of this model", "it is of another", "choose another name, or delete it")
        if metadata.get("cache_bits") != str(_BITS[self._dtype]):
            got = f"it has {metadata.get('cache_bits')} bits and the runtime {_BITS[self._dtype]}"
            raise self._refusal("have the cache bits of the runtime", got, "load with those, or choose another name")
        count = tensors["tokens"].shape[0] if "tokens" in tensors else 0
        expected = {"tokens": ("I32", (count,))} | cache.shapes(count)
        if {name: (t.dtype, t.shape) for name, t in tensors.items()} != expected:
            raise self._refusal("hold the keys and values of its tokens", "their shapes differ")
        self.tokens = tensors["tokens"].data.tolist()
        self._arrays = {name: tensor.data for name, tensor in tensors.items() if name != "tokens"}

    def _refusal(self, rule: str, got: str, way_out: str = "delete it, and it is made anew") -> ThriftyError:
        return ThriftyError(f"[prompt_cache] {self.path} must {rule}; {got}; {way_out}")


def model_digest(folder: Folder) -> str:
    """A digest by which two models differ: config, names, dtypes and shapes; norms and scales whole, and of every large
    tensor pieces from its beginning to its end, so that a model of any size is known in milliseconds.

    Models that differ only in a few weights between the pieces, their scales alike, are taken for one.
    """
    digest = hashlib.blake2b(repr(folder.config).encode(), digest_size=16)
    for name, tensor in sorted(folder.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        data = tensor.data.reshape(-1).view(np.uint8)
        last = len(data) - _PIECE_BYTES
        if len(data) <= _WHOLE_BYTES:
            digest.update(data.data)
        else:
            for i in range(_PIECES):
                start = last * i // (_PIECES - 1)
                digest.update(data[start : start + _PIECE_BYTES].data)
    return digest.hexdigest()
