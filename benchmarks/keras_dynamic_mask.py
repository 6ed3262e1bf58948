"""DynamicMaskAttention beside Keras' own causal attention, on the backend that KERAS_BACKEND names.

    python benchmarks/keras_dynamic_mask.py [--tokens 2048] [--window 128] [--rounds 7]

Batch 1, 8 heads of 64 features, 8 and 2 kv heads, float32. The result is first checked against the spec. Times are
medians of `predict_on_batch` and `train_on_batch`, as Keras compiles a model by default, taken in turn.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from _measure import machine_line, seconds
from keras import ops

from thrifty import spec
from thrifty.keras.layers import DynamicMaskAttention
from thrifty.keras.layers.dynamic_mask_attention import dynamic_mask_attention

DIM, HEADS = 512, 8
HEAD_DIM = DIM // HEADS


def model(tokens: int, window: int | None, kv_heads: int = HEADS) -> keras.Model:
    """One layer; without a window, Keras' own."""
    x = keras.Input((tokens, DIM), batch_size=1)
    if window is None:
        y = keras.layers.MultiHeadAttention(HEADS, HEAD_DIM)(x, x, use_causal_mask=True)
    else:
        y = DynamicMaskAttention(HEADS, HEAD_DIM, kv_heads, window=window)(x)
    built = keras.Model(x, y)
    built.compile("sgd", "mse")
    return built


def check(tokens: int, window: int) -> float:
    """Largest difference from the spec, relative to the largest magnitude."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, tokens, 2, HEAD_DIM), np.float32) for _ in range(3))
    scores = np.exp(rng.standard_normal((1, tokens, 2), np.float32))
    y = dynamic_mask_attention(*(ops.convert_to_tensor(t) for t in (q, k, v, scores)), window)
    expected = spec.dynamic_mask_attention(q[0], k[0], v[0], scores[0], window)
    return float(np.abs(ops.convert_to_numpy(y)[0] - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(machine_line())
    print(f"keras {keras.__version__} on {keras.backend.backend()}; {args.tokens} tokens, window {args.window}")
    difference = check(min(args.tokens, 1024), args.window)
    if not difference <= spec.TOLERANCES["float32"]:
        raise SystemExit(f"the result differs from the spec by {difference:.1e} of its largest value")
    x = np.random.default_rng(1).standard_normal((1, args.tokens, DIM), np.float32)
    models = {"MultiHeadAttention": model(args.tokens, None)}
    models |= {f"{kv} kv heads": model(args.tokens, args.window, kv) for kv in (HEADS, 2)}
    for what, call in (
        ("forward", lambda m: m.predict_on_batch(x)),
        ("training step", lambda m: m.train_on_batch(x, x)),
    ):
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(args.rounds + 2):
            for name, built in models.items():
                took = seconds(lambda built=built, call=call: call(built))
                if turn > 1:
                    times[name].append(took)
        medians = {name: float(np.median(taken)) for name, taken in times.items()}
        peer = medians.pop("MultiHeadAttention")
        ours = ", ".join(f"{name} {1e3 * t:.1f} ms ({peer / t:.2f} x)" for name, t in medians.items())
        print(f"{what}: MultiHeadAttention {1e3 * peer:.1f} ms; {ours}")


if __name__ == "__main__":
    main()
