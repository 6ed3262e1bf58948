from typing import Any

import numpy as np
import pytest
import torch
from transformers import Cache, DynamicCache

from thrifty import nn, ops, spec
from thrifty.errors import ThriftyError

#: Dense projections: an integer code cannot fall on the other side of a float's last bit.
OPTIONS = {
    "kv": {},
    "attention": {"dt_heads": "attention"},
    "doge": {"qk_norm": True, "bias": True, "sub_norm": True},
}
T = 40


def make(window: int | None = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.DynamicMaskAttention(
        *(32, 4, 2), window=window, selection="none" if window is None else "keep_window", **options
    )
    torch.nn.init.normal_(layer.A)
    return layer.eval()


def rotary(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    return nn.RotaryEmbedding(8, 128)(torch.arange(start, stop)[None])


def cache() -> Any:
    return Cache(layers=[nn.DynamicMaskLayer()])


def in_parts(layer: Any, x: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None, kept: Any = None):
    kept, at, parts = kept or cache(), 0, []
    for part in x.split(sizes, 1):
        end = at + part.shape[1]
        parts.append(layer(part, rotary(at, end), None if mask is None else mask[:, :end], kept))
        at = end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("window", [6, 100, None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * T, [25, *[1] * 15], [3, 1, 1, 20, 1, 1, 13], [6, 1, 33], [39, 1]])
def test_steps_and_chunks_equal_the_whole(window, options, sizes):
    layer = make(window, **options)
    x = torch.randn(2, T, 32)
    with torch.no_grad():
        torch.testing.assert_close(in_parts(layer, x, sizes), layer(x, rotary(0, T)), rtol=1e-5, atol=1e-5)


def test_equal_scores_keep_the_newest_keys():
    layer = make(6)
    torch.nn.init.zeros_(layer.A)
    x = torch.randn(1, T, 32)
    with torch.no_grad():
        y = layer(x, rotary(0, T))
        torch.testing.assert_close(y[:, -1:], layer(x[:, -6:], rotary(T - 6, T))[:, -1:], rtol=1e-5, atol=1e-5)
        for sizes in ([1] * T, [25, *[1] * 15], [3, 1, 1, 20, 1, 1, 13]):
            torch.testing.assert_close(in_parts(layer, x, sizes), y, rtol=1e-5, atol=1e-5)


def test_repeated_tokens_tie_in_every_mode():
    """Three different tokens in turns: which of the equal keys are kept is told apart by their positions."""
    layer = make(6, weight="ternary", norm="rms")
    x = torch.randn(1, 3, 32).repeat(1, 14, 1)[:, :T]
    with torch.no_grad():
        y = layer(x, rotary(0, T))
        for sizes in ([1] * T, [25, *[1] * 15], [3, 1, 1, 20, 1, 1, 13]):
            torch.testing.assert_close(in_parts(layer, x, sizes), y, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("sizes", [[T], [1] * T, [25, *[1] * 15], [3, 1, 1, 20, 1, 1, 13]])
@pytest.mark.parametrize("window", [6, None])
def test_left_padding_changes_nothing(sizes, window):
    layer = make(window)
    x, pad = torch.randn(2, T, 32), 9
    rows = torch.cat([torch.randn(1, pad, 32), x[1:, : T - pad]], 1)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :pad] = False
    with torch.no_grad():
        alone = layer(x[1:, : T - pad])
        both, at, kept = [], 0, cache()
        for part in torch.cat([x[:1], rows]).split(sizes, 1):
            at += part.shape[1]
            both.append(layer(part, None, mask[:, :at], kept))
        y = torch.cat(both, 1)
        torch.testing.assert_close(y[1:, pad:], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y[:1], layer(x[:1]), rtol=1e-5, atol=1e-5)


def test_no_future_is_seen():
    for window in (6, None):
        layer = make(window)
        x = torch.randn(1, T, 32)
        mask = torch.arange(T)[None] >= 3
        moved = x.clone()
        moved[:, 30] += 1
        for padding in (None, mask):
            y, z = layer(x, rotary(0, T), padding), layer(moved, rotary(0, T), padding)
            assert torch.equal(y[:, :30], z[:, :30])
            assert not torch.equal(y[:, 30:], z[:, 30:])


def test_the_cache_does_not_grow():
    layer, kept = make(6), cache()
    x = torch.randn(2, 200, 32)
    sizes = set()
    with torch.no_grad():
        layer(x[:, :6], None, None, kept)
        for part in x[:, 6:].split([1, 1, 50, 1, 141], 1):
            layer(part, None, None, kept)
            sizes.add(tuple(slots.numel() for slots in kept.layers[0].slots))
    assert len(sizes) == 1
    assert kept.get_seq_length() == 200


def test_a_key_is_scored_once(monkeypatch):
    layer, kept, scored = make(6), cache(), []
    plain = ops.key_scores
    monkeypatch.setattr(ops, "key_scores", lambda v, *rest: scored.append(v.shape[2]) or plain(v, *rest))
    in_parts(layer, torch.randn(1, T, 32), [25, *[1] * 15], None, kept)
    assert scored == [25, *[1] * 15]


def test_gradients_flow_through_the_cache():
    layer = make(6)
    x = torch.randn(1, T, 32)
    grads = []
    for y in (layer(x, rotary(0, T)), in_parts(layer, x, [25, *[1] * 15])):
        grads.append(torch.autograd.grad(y.square().sum(), tuple(layer.parameters())))
    for whole, parts in zip(*grads, strict=True):
        assert whole.any()
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_beams_are_reordered_repeated_and_selected():
    layer, x = make(6), torch.randn(2, T, 32)
    with torch.no_grad():
        whole = layer(x, rotary(0, T))
        kept = cache()
        layer(x[:, :30], rotary(0, 30), None, kept)
        kept.batch_repeat_interleave(2)
        kept.reorder_cache(torch.tensor([3, 2, 1, 0]))
        y = in_parts_from(layer, x[[1, 1, 0, 0]], 30, 35, kept)
        torch.testing.assert_close(y, whole[[1, 1, 0, 0], 30:35], rtol=1e-5, atol=1e-5)
        kept.batch_select_indices(torch.tensor([3, 0]))
        y = in_parts_from(layer, x, 35, T, kept)
        torch.testing.assert_close(y, whole[:, 35:], rtol=1e-5, atol=1e-5)
        kept.reset()
        assert kept.get_seq_length() == 0
        torch.testing.assert_close(in_parts(layer, x, [T], None, kept), whole, rtol=1e-5, atol=1e-5)


def filled(layer: Any, x: torch.Tensor) -> Any:
    kept = cache()
    layer(x, None, None, kept)
    return kept


def in_parts_from(layer: Any, x: torch.Tensor, start: int, end: int, kept: Any) -> torch.Tensor:
    steps = [layer(x[:, t : t + 1], rotary(t, t + 1), None, kept) for t in range(start, end)]
    return torch.cat(steps, 1)


def test_what_a_bounded_cache_cannot_do_is_refused():
    layer, kept = make(6), cache()
    x = torch.randn(1, T, 32)
    layer(x, None, None, kept)
    kept.crop(0)
    assert not kept.is_croppable
    with pytest.raises(ThriftyError, match=r"cannot be brought back; got crop.-1.; generate without an assistant"):
        kept.crop(-1)
    with pytest.raises(ThriftyError, match="give the mixer its own layer"):
        kept.update(x[None], x[None], 0)
    for other in (DynamicCache(), Cache(layers=[nn.RecurrentLayer()])):
        with pytest.raises(ThriftyError, match="needs a DynamicMaskLayer; got"):
            layer(x, None, None, other)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_legacy_ratio_is_the_threshold_over_all_keys(ratio):
    with pytest.warns(UserWarning, match="see the future"):
        layer = nn.DynamicMaskAttention(32, 4, 2, selection="ratio_legacy", ratio=ratio, weight="dense").eval()
    torch.nn.init.normal_(layer.A)
    x = torch.randn(1, T, 32)
    with torch.no_grad():
        q, k, v = (p(x).view(1, T, -1, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        scores = torch.exp(layer.A * torch.nn.functional.softplus(layer.dt_proj(layer.v_proj(x)))).transpose(1, 2)
        lowest = torch.finfo(torch.float32).min
        n = int(T * ratio)
        if n:
            scores = scores.masked_fill(scores < scores.kthvalue(n, -1, keepdim=True).values, lowest)
        future = torch.ones(T, T).triu(1) * lowest
        added = (scores[:, :, None] + future.nan_to_num(0)).repeat_interleave(2, 1)
        logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5 + added
        y = torch.softmax(logits, -1) @ v.repeat_interleave(2, 1)
        expected = layer.o_proj(y.transpose(1, 2).flatten(2))
        # Published code mixes dropped keys with keys to come where a query has no other.
        start = int(((scores > lowest).cumsum(-1) == 0).sum(-1).max())
        assert start < T - 1
        torch.testing.assert_close(layer(x)[:, start:], expected[:, start:], rtol=1e-4, atol=1e-5)
        last = layer(x[:, -1:], None, None, filled(layer, x[:, :-1]))
        torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-5)


def test_ratio_keeps_a_share_of_the_longest_text():
    by_ratio = nn.DynamicMaskAttention(32, 4, selection="ratio", ratio=0.1, max_positions=64)
    assert by_ratio.window == 6
    assert nn.kept_keys("none", 5) is None


def test_the_module_equals_the_spec():
    layer = make(6, qk_norm=True, bias=True)
    x = torch.randn(1, T, 32)
    tables = rotary(0, T)
    with torch.no_grad():
        q, k, v = (p(x)[0].view(T, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = layer.q_norm(q), layer.k_norm(k)
        q, k, v = (t.numpy() for t in (ops.apply_rope(q, *tables)[0], ops.apply_rope(k, *tables)[0], v))
        b = spec.key_scores(v, layer.A.numpy(), layer.dt_proj.weight.numpy(), layer.dt_proj.bias.numpy())
        y = torch.from_numpy(spec.dynamic_mask_attention(q, k, v, b, 6)).flatten(1)
        np.testing.assert_allclose(layer(x, tables)[0], layer.o_proj(y), rtol=0, atol=1e-5)


def test_the_seeds_module_returns_its_cache():
    attn = nn.DMAttn(64, 4, 128, layer_idx=0).eval()
    assert {name for name, _ in attn.named_parameters()} == {
        "A",
        *(f"{p}_proj.{part}" for p in ("q", "k", "v", "o", "dt") for part in ("weight", "bias")),
    }
    x = torch.randn(2, 20, 64)
    y, past = attn(x, torch.ones(2, 20))
    assert y.shape == x.shape
    assert past is None
    assert torch.equal(y, attn(x)[0])
    kept = cache()
    first, past = attn(x[:, :19], torch.ones(2, 19), past_key_values=kept)
    assert past is kept
    last, _ = attn(x[:, 19:], torch.ones(2, 20), past_key_values=kept)
    torch.testing.assert_close(torch.cat([first, last], 1), y, rtol=1e-5, atol=1e-5)


def test_the_seeds_module_has_options():
    attn = nn.DMAttn(
        *(64, 4, 32), n_kv_heads=2, selection="ratio", ratio=0.25, rope_theta=10_000.0, qk_norm=True, weight="ternary"
    ).eval()
    assert attn.window == 8
    x = torch.randn(1, 20, 64)
    y, _ = attn(x)
    assert torch.equal(attn(x, position_ids=torch.arange(20)[None])[0], y)
    assert not torch.equal(attn(x, position_ids=torch.zeros(1, 20, dtype=torch.long))[0], y)
    with pytest.raises(ThriftyError, match=r"attention_mask must be .B, S., 1 at tokens"):
        attn(x, torch.zeros(1, 1, 20, 20))
    with pytest.raises(ThriftyError, match="must fit max_position_embeddings = 32; got 33"):
        attn(torch.randn(1, 33, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"selection": "best"},
            "dynamic_mask_selection must be one of none, keep_window, ratio, ratio_legacy; got 'best'",
        ),
        (
            {"window": 0},
            "keep_window_size must be an integer of at least 1; got 0; dynamic_mask_selection='none' keeps every key",
        ),
        ({}, "keep_window_size must be an integer of at least 1; got None"),
        (
            {"selection": "ratio", "ratio": 0.01, "max_positions": 50},
            "dynamic_mask_ratio must be in .0, 1.*got 0.01 of 50",
        ),
        (
            {"selection": "ratio_legacy", "ratio": 1.0},
            "dynamic_mask_ratio must be in .0, 1. for 'ratio_legacy'; got 1.0",
        ),
        ({"window": 4, "dt_heads": "both"}, "dt_heads must be one of kv, attention; got 'both'"),
        ({"window": 4, "kv_heads": 3}, "multiple of kv heads; got 8 and 3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ThriftyError, match=message):
        nn.DynamicMaskAttention(64, **arguments)
    with pytest.raises(ThriftyError, match=r"sliding_window must be None.*got 8; set it to None"):
        nn.kept_keys("keep_window", 4, sliding_window=8)
