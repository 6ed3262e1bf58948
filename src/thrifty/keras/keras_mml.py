"""Models saved by Keras-MML 0.1.1 and later, read into layers of `thrifty.keras`."""

import io
import json
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from thrifty.checkpoint.keras_mml import decode_ternary
from thrifty.errors import ThriftyError, ThriftyWarning
from thrifty.keras import layers
from thrifty.keras.layers.core import dense_layers
from thrifty.keras.packed_dense import KEYS, PackedDense
from thrifty.keras.packing import pack

#: What a group of a weights file holds, by the path of its layer: arrays by name.
Groups = dict[str, dict[str, np.ndarray]]
#: Before the names of classes.
PACKAGE = "keras_mml>"
GLU_VARIANTS = ("BilinearMML", "GeGLUMML", "ReGLUMML", "SeGLUMML", "SwiGLUMML")


def load_keras_mml(path: str | Path, model: keras.Model | None = None) -> keras.Model:
    """y = act((x_q W_q) / g + b) -> act((x_q W_q) * float32(1 / g) + b): the same codes, and the scale turned over.

    path: a `.keras` archive; or a `.weights.h5` file, with the built `model` of our layers that it is read into. Gives
    the model packed, and not compiled where it is new; `unpack` makes it trainable, its scales then the nearest that
    bfloat16 holds. Answers differ by the rounding of float32, and by the 1e-5 in the root of our norm, theirs has none.

    A gain of Keras-MML has a row for each position; it is read where all rows are equal, as one of ours serves every
    position. Inside of a layer of several parts (GLUMML, GRUMML, ...), parts are told apart by shapes, then by names;
    where neither decides, they are taken in the order of their names, with a ThriftyWarning.
    Raises ThriftyError where the file is not of Keras-MML, is of version 0.1.0, is damaged, or has other layers.
    Source: the format of Keras-MML 0.1.1 and 0.1.2 as described; tested with files made by that description.
    """
    path = Path(path)
    if not path.is_file():
        raise ThriftyError(f"[load_keras_mml] the file must exist; got {path}; check the path")
    if path.suffix == ".h5":
        if model is None:
            raise ThriftyError(
                f"[load_keras_mml] weights need a model to be read into; got {path} alone; give the model too"
            )
        source: Any = path
    else:
        config, source = _open_archive(path)
        model = keras.saving.deserialize_keras_object(config) if model is None else model
    if not model.built:
        raise ThriftyError(f"[load_keras_mml] a model must be built; '{model.name}' is not; call it once")
    try:
        with h5py.File(source, "r") as file:
            groups = _groups(file)
    except OSError as error:
        raise ThriftyError(
            f"[load_keras_mml] weights are an HDF5 file; {path}: {error}; save the model anew"
        ) from error
    _fill(model, _thrifty_groups(groups))
    return model


def _open_archive(path: Path) -> tuple[dict[str, Any], io.BytesIO]:
    """The config of a model, of our layers, and its weights file."""
    try:
        with zipfile.ZipFile(path) as archive:
            text, weights = archive.read("config.json").decode(), io.BytesIO(archive.read("model.weights.h5"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ThriftyError(
            f"[load_keras_mml] a .keras file is a zip of config.json and weights; {path}: {error}"
        ) from error
    if PACKAGE not in text:
        raise ThriftyError(
            f"[load_keras_mml] the file must hold layers of Keras-MML; {path} has none; use keras.saving.load_model"
        )
    config = _renamed(json.loads(text))
    return {**config, "compile_config": None}, weights


def _renamed(config: Any) -> Any:
    """The config of any object with the layers of Keras-MML in it replaced by ours."""
    if isinstance(config, list):
        return [_renamed(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _renamed(value) for key, value in config.items()}
    name = config.get("registered_name") or ""
    if not name.startswith(PACKAGE):
        return config
    name = name.removeprefix(PACKAGE)
    if name not in layers.__all__:
        raise ThriftyError(
            f"[load_keras_mml] a layer of Keras-MML must be one of {', '.join(layers.__all__)}; got {name}"
        )
    # Recurrent layers make their cells, and the kinds of GLUMML know their activations.
    dropped = ("cell", "activation") if name in GLU_VARIANTS else ("cell",)
    own = {key: value for key, value in config["config"].items() if key not in dropped}
    return {**config, "module": layers.__name__, "registered_name": f"thrifty>{name}", "config": own}


def _groups(file: h5py.File) -> Groups:
    """Arrays of every layer that has some; the optimizer's and those of random generators are left out."""
    found: Groups = {}

    def visit(name: str, item: Any) -> None:
        owner, _, last = name.rpartition("/")
        if last == "vars" and len(item) and not re.match(r"optimizer\b|(.*/)?seed_generator\b", name):
            found[owner] = {key: item[key][()] for key in item}

    file.visititems(visit)
    return found


def _thrifty_groups(groups: Groups) -> Groups:
    """Groups of Keras-MML with those of each DenseMML and of the norm inside of it as one group of ours."""
    dense = {path for path, arrays in groups.items() if "kernel_encoded" in arrays}
    found = {}
    for path, arrays in groups.items():
        owner, _, _ = path.rpartition("/")
        if owner in dense:
            continue
        if path in dense:
            gains = [group["0"] for other, group in groups.items() if other.rpartition("/")[0] == path and "0" in group]
            arrays = _packed(path, arrays, gains)
        found[path] = arrays
    return found


def _packed(path: str, arrays: dict[str, np.ndarray], gains: list[np.ndarray]) -> dict[str, np.ndarray]:
    missing = {"kernel_shape", "kernel_scale"} - set(arrays)
    if missing or len(gains) != 1:
        raise ThriftyError(
            f"[load_keras_mml] a DenseMML has a kernel, its shape and scale, and a norm; '{path}' lacks "
            f"{', '.join(sorted(missing)) or 'the norm'}; save the whole model"
        )
    shape = tuple(int(n) for n in arrays["kernel_shape"])
    try:
        codes = decode_ternary(arrays["kernel_encoded"], shape)
    except ThriftyError as error:
        raise ThriftyError(f"[load_keras_mml] the kernel of '{path}' cannot be read: {error}") from error
    dense = PackedDense(path)
    scale = np.float32(1) / np.float32(arrays["kernel_scale"])
    dense.assign(np.ascontiguousarray(codes.T), scale, arrays.get("bias"), _one_row(path, gains[0]))
    return dense.store()


def _one_row(path: str, gain: np.ndarray) -> np.ndarray:
    """A gain [..., d] that is the same at every position, as [d]."""
    rows = gain.reshape(-1, gain.shape[-1])
    if (rows != rows[0]).any():
        raise ThriftyError(
            f"[load_keras_mml] a gain must be the same at every position; that of '{path}' differs over the "
            f"{len(rows)} it was built for; train this model anew with thrifty.keras"
        )
    return rows[0]


def _fill(model: keras.Model, groups: Groups) -> None:
    """Load groups into a model, whose own weights file tells which groups it wants."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "model.weights.h5"
        model.save_weights(name)
        with h5py.File(name, "r+") as file:
            for wanted, given in _pairs(_groups(file), groups).items():
                variables = file[f"{wanted}/vars"]
                for key in list(variables):
                    shape = variables[key].shape
                    del variables[key]
                    if key in groups[given] and len(shape) == 1:
                        groups[given][key] = _one_row(given, groups[given][key])
                variables.update(groups[given])
        if dense_layers(model):
            pack(model)
        model.load_weights(name)


def _pairs(wanted: Groups, given: Groups) -> dict[str, str]:
    """The path in `given` for each path in `wanted`: the same, or else the one of its layer that fits."""
    pairs = {path: path for path in wanted if path in given and _fits(given[path], wanted[path])}
    for layer in {_layer(path) for path in (*wanted, *given)}:
        ours = [path for path in wanted if _layer(path) == layer and path not in pairs]
        theirs = [path for path in given if _layer(path) == layer and path not in pairs]
        while ours:
            fitting = [path for path in theirs if _fits(given[path], wanted[ours[0]])]
            alike = [path for path in ours if [p for p in theirs if _fits(given[p], wanted[path])] == fitting]
            if len(alike) != len(fitting):
                raise _other_layers(layer, ours, theirs)
            pairs |= _by_name(layer, alike, fitting)
            ours = [path for path in ours if path not in alike]
            theirs = [path for path in theirs if path not in fitting]
        if theirs:
            raise _other_layers(layer, ours, theirs)
    return pairs


def _layer(path: str) -> str:
    """The innermost layer of a model that a path lies in."""
    return re.match(r"(.*\blayers/)?[^/]*", path)[0]  # pyright: ignore[reportOptionalSubscript]


def _fits(given: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether arrays have the names and shapes of a group, but for axes of positions in a gain of Keras-MML."""
    one, other = _shapes(given), _shapes(wanted)
    return one.keys() == other.keys() and all(
        shape == other[key] or (len(other[key]) == 1 and shape[-1:] == other[key]) for key, shape in one.items()
    )


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; a packed kernel has that of the float one."""
    shapes = {key: value.shape for key, value in arrays.items() if key not in KEYS}
    if KEYS[0] in arrays:
        shapes["kernel"] = tuple(arrays["kernel_shape"].tolist())[::-1]
    return shapes


def _by_name(layer: str, ours: list[str], theirs: list[str]) -> dict[str, str]:
    """Pairs of paths that fit each other, by the words they share."""
    best = {path: sorted(theirs, key=lambda other, path=path: -_shared(path, other)) for path in ours}
    sure = all(len(theirs) == 1 or _shared(p, o[0]) > _shared(p, o[1]) for p, o in best.items())
    if sure and len({others[0] for others in best.values()}) == len(ours):
        return {path: others[0] for path, others in best.items()}
    ours, theirs = sorted(ours, key=_order), sorted(theirs, key=_order)
    warnings.warn(
        f"[load_keras_mml] the file does not say which is which in '{layer}'; {', '.join(theirs)} were taken for "
        f"{', '.join(ours)}, in this order; compare answers with Keras-MML's before use",
        ThriftyWarning,
        stacklevel=4,
    )
    return dict(zip(ours, theirs, strict=True))


def _shared(path: str, other: str) -> int:
    """How many words of a path begin, or are begun by, a word of another."""
    words = re.findall(r"[a-z]+|\d+", other.lower())
    return sum(any(a.startswith(b) or b.startswith(a) for b in words) for a in re.findall(r"[a-z]+|\d+", path.lower()))


def _order(path: str) -> list[Any]:
    """Paths in the order of their names, numbers by their worth."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.findall(r"\d+|\D+", path)]


def _other_layers(layer: str, ours: list[str], theirs: list[str]) -> ThriftyError:
    return ThriftyError(
        f"[load_keras_mml] the file must hold the layers of the model; '{layer}' wants "
        f"{', '.join(ours) or 'no others'} and is given {', '.join(theirs) or 'nothing'}; build it as it was saved"
    )
