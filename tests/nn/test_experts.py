import math
from typing import Any

import pytest
import torch
from transformers import DogeConfig
from transformers.models.doge import modeling_doge

from thrifty import nn, spec
from thrifty.errors import ThriftyError

ROUTERS = [{"router": "linear"}, {"router": "product_key_heads", "n_experts_heads": 2}]


def layer(**options) -> nn.CDMoE:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"d_ff": 24, "d_private_expert_retrieval": 8, "n_experts": 64, "n_experts_per_head": 5}
    return nn.CDMoE(16, "silu", **(defaults | options))


def test_the_seeds_call_with_either_names():
    x = torch.rand(2, 16, 64)
    names: list[dict[str, Any]] = [
        {"d_ff": 256, "d_private_expert_retrieval": 64},
        {"d_cd": 256, "d_expert_retrieval": 64},
    ]
    for sizes in names:
        moe = nn.CDMoE(d_model=64, act_fn="silu", n_experts=64, n_experts_heads=1, n_experts_per_head=2, **sizes)
        assert moe(x).shape == x.shape
        assert moe.gate_proj.out_features == 256
        assert moe.keys.shape == (1, 8, 2, 32)


@pytest.mark.parametrize("options", ROUTERS)
def test_it_is_what_the_spec_says(options):
    moe, x = layer(**options), torch.randn(2, 3, 16)
    rows = x.flatten(0, 1)
    if options["router"] == "linear":
        scores = [moe.router_gate(rows)[:, None, half : half + 8] for half in (0, 8)]
    else:
        queries = moe.queries(rows).view(-1, 2, 2, 4)
        scores = [torch.einsum("thr,hkr->thk", queries[:, p], moe.keys[:, :, p]) for p in (0, 1)]
    sums, indices = spec.product_key_topk(scores[0].detach().numpy(), scores[1].detach().numpy(), 5)
    weights = torch.from_numpy(sums).softmax(-1).flatten(1).numpy()
    tables = (moe.down_embed.weight.detach().numpy(), moe.up_embed.weight.detach().numpy())
    args = (rows.numpy(), indices.reshape(6, -1), weights, *tables, spec.ACTIVATIONS["silu"])
    shared = moe.down_proj(torch.nn.functional.silu(moe.gate_proj(rows)) * moe.up_proj(rows))
    expected = shared + torch.from_numpy(spec.product_key_experts(*args))
    torch.testing.assert_close(moe(x).flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [*ROUTERS, {"router": "linear", "weight": "ternary"}, {"norm_topk_prob": True}])
def test_a_token_sees_no_other(options):
    moe, x = layer(**options).eval(), torch.randn(2, 9, 16)
    with torch.no_grad():
        y = moe(x)
        x[0, 5] += 1
        moved = (moe(x) != y).any(-1)
        assert moved[0, 5]
        assert moved.sum() == 1
        torch.testing.assert_close(torch.cat([moe(x[:, t : t + 1]) for t in range(9)], 1), moe(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", ROUTERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_flow_from_the_first_step(options, sparse):
    moe = layer(sparse_grad=sparse, **options)
    moe(torch.randn(2, 9, 16)).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().any(), name
    assert moe.down_embed.weight.grad.is_sparse == sparse  # pyright: ignore


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_low_bit_layers_beside_dense_experts(weight):
    moe = layer(weight=weight, router="linear")
    assert {type(m) for m in (moe.gate_proj, moe.up_proj, moe.down_proj)} == {nn.BitLinear}
    assert isinstance(moe.router_gate, torch.nn.Linear)
    assert nn.pack(moe)(torch.randn(3, 16)).shape == (3, 16)


def doge(**options):
    torch.manual_seed(1)
    config = DogeConfig(
        hidden_size=16, intermediate_size=24, is_moe=True, num_experts=64, num_experts_per_tok=5, **options
    )
    return modeling_doge.DogeCDMoE(config)


def linear(peer, **options):
    moe = nn.CDMoE(16, "silu", 24, None, 64, 1, 5, router="linear", bias=False, **options)
    moe.load_state_dict(peer.state_dict())
    return moe


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_legacy_layout_is_that_of_transformers(norm_topk_prob):
    peer, x = doge(norm_topk_prob=norm_topk_prob), torch.randn(2, 7, 16)
    with pytest.warns(UserWarning, match="mixes the scores of tokens"):
        moe = linear(peer, router_layout="legacy", norm_topk_prob=norm_topk_prob)
    expected, logits = peer(x)
    y, scores = moe(x, output_router_logits=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(scores, logits)


def test_a_single_token_is_that_of_transformers():
    peer, x = doge(), torch.randn(1, 1, 16)
    torch.testing.assert_close(linear(peer)(x), peer(x)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_loss_is_that_of_transformers(padded):
    logits = [torch.randn(2, 14, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = not padded
    loss = nn.load_balance_loss(logits, 5, mask if padded else None)
    their_mask: Any = mask.long() if padded else None
    expected: Any = modeling_doge.load_balancing_loss_func(tuple(logits), 64, 8, 5, their_mask)  # pyright: ignore
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_load_balance_loss_of_several_heads():
    x = torch.randn(2, 6, 16)
    _, logits = layer(n_experts_heads=2)(x, output_router_logits=True)
    assert logits.shape == (2, 24, 8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2:] = False
    kept = logits.view(2, 12, 2, 8)[:, mask.flatten()].flatten(1, 2)
    torch.testing.assert_close(nn.load_balance_loss(logits, 5, mask), nn.load_balance_loss(kept, 5))
    assert nn.load_balance_loss(torch.zeros(2, 4, 8), 64) == pytest.approx(1)


def test_usage():
    moe = layer(router="linear", track_usage=True)
    _, logits = moe(torch.randn(50, 16), output_router_logits=True)
    pairs = (logits[0, :, :, None] + logits[1, :, None, :]).flatten(1).topk(5).indices
    share, entropy = moe.usage()
    counts = torch.bincount(pairs.flatten(), minlength=64)
    assert share == (counts > 0).sum() / 64
    p = counts[counts > 0] / 250
    assert entropy == pytest.approx(-(p * p.log()).sum().item() / math.log(64), rel=1e-5)
    assert "expert_counts" not in moe.state_dict()
    with pytest.raises(ThriftyError, match="make the layer with track_usage=True"):
        layer().usage()


def test_wrong_sizes_are_named():
    with pytest.raises(ThriftyError, match=r"n_experts must be the square .*; got 16348; take 16129 or 16384"):
        layer(n_experts=16348)
    with pytest.raises(ThriftyError, match=r"n_experts_per_head must be 1 to n_experts = 64; got 65; choose fewer"):
        layer(n_experts_per_head=65)
    assert layer(n_experts_per_head=64)(torch.randn(3, 16)).shape == (3, 16)
    with pytest.raises(ThriftyError, match="n_experts_heads must be 1 with router='linear'"):
        layer(router="linear", n_experts_heads=2)
    with pytest.raises(ThriftyError, match="d_private_expert_retrieval must be even"):
        layer(d_private_expert_retrieval=7)
    with pytest.raises(ThriftyError, match="d_ff and d_cd name one size; got 24 and 25"):
        layer(d_cd=25)
    with pytest.raises(ThriftyError, match="router must be one of"):
        layer(router="hash")
    with pytest.raises(ThriftyError, match="'legacy' is of router='linear'"):
        layer(router_layout="legacy")
    with pytest.raises(ThriftyError, match="num_experts must be the square"):
        nn.PEER(16, num_experts=15)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("pre_rmsnorm", [False, True])
def test_peer(separate, pre_rmsnorm):
    torch.manual_seed(0)
    peer = nn.PEER(
        16, heads=2, num_experts=64, num_experts_per_head=4, separate_embed_per_head=separate, pre_rmsnorm=pre_rmsnorm
    )
    x = torch.randn(2, 5, 16)
    rows = peer.norm(x) if peer.norm is not None else x
    q = peer.to_queries(rows).view(2, 5, 2, 2, 8)
    scores = torch.einsum("btphr,hkpr->pbthk", q, peer.keys)
    sums, chosen = (scores[0, ..., :, None] + scores[1, ..., None, :]).flatten(-2).topk(4)
    offset = torch.arange(2)[:, None] * 64 * separate
    down, up = peer.weight_down_embed(chosen + offset), peer.weight_up_embed(chosen + offset)
    hidden = torch.nn.functional.gelu(torch.einsum("btd,bthkd->bthk", rows, down)) * sums.softmax(-1)
    torch.testing.assert_close(peer(x), torch.einsum("bthk,bthkd->btd", hidden, up), rtol=1e-4, atol=1e-5)


def test_peer_reaches_every_expert():
    # The seed looked rows up by their rank among the pairs: with k = 4 only experts 0 ... 15 were ever used.
    torch.manual_seed(0)
    peer = nn.PEER(16, heads=2, num_experts=64, num_experts_per_head=4, activation="silu", dropout=0.1)
    peer(torch.randn(1, 300, 16)).sum().backward()
    assert peer.weight_up_embed.weight.grad.any(-1).float().mean() > 0.9  # pyright: ignore


def test_peers_options():
    with pytest.raises(ThriftyError, match="product_key_topk must be at least num_experts_per_head 4"):
        nn.PEER(16, num_experts=64, num_experts_per_head=4, product_key_topk=3)
    with pytest.raises(ThriftyError, match="must be one of silu"):
        nn.PEER(16, num_experts=64, activation=torch.nn.Tanh)
    assert nn.PEER(16, num_experts=64, activation=torch.nn.ReLU, product_key_topk=16).activation == "relu"
