"""Against plain transformers, and the seed's calls."""

import pytest
import torch
import transformers
from models.suite import MIXTURES, SMALL, close_in_most, small_model, small_tokens

from thrifty.models import BitNetConfig, BitNetForCausalLM, BitNetModel, BitNetTransformer, save_packed
from thrifty.nn import is_packed, pack

pytestmark = pytest.mark.usefixtures("quiet")


def bitnet(seed: int = 0, **fields) -> BitNetForCausalLM:
    torch.manual_seed(seed)
    config = {**SMALL, **MIXTURES["bitnet"], "initializer_range": 0.3, "hidden_act": "silu", **fields}
    return BitNetForCausalLM(BitNetConfig(**config)).eval()


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits.float()


@pytest.mark.parametrize(
    "fields",
    [{}, {"hidden_act": "relu2", "tie_word_embeddings": False}, {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6}],
)
def test_plain_transformers_computes_the_same_from_a_packed_folder(eager_bitnet, tmp_path, fields):
    model = bitnet(**fields)
    save_packed(model, tmp_path, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.BitNetForCausalLM
    tokens = small_tokens(100, 4)
    # Its norm and its quantiser round in another order, and its products are not exact: some codes fall elsewhere.
    close_in_most(logits(theirs, tokens), logits(model, tokens))


def test_plain_transformers_runs_a_folder_in_bfloat16(eager_bitnet, tmp_path):
    model = bitnet()
    save_packed(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = small_tokens(8, 12)
    ours, got = logits(model, tokens), logits(theirs, tokens)
    assert (got - ours).abs().mean() < 0.03 * (ours.max() - ours.min())


def test_plain_transformers_reads_a_latent_folder(eager_bitnet, tmp_path):
    model = bitnet()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = small_tokens(8, 12)
    ours, got = logits(model, tokens), logits(theirs, tokens)
    # It does not round its scales to bfloat16.
    assert (got - ours).abs().mean() < 0.02 * (ours.max() - ours.min())


def test_dense_weights_of_plain_transformers_load(tmp_path):
    """Without any quantisation its BitNet and our dense mixture are the same decoder, to float rounding."""
    torch.manual_seed(0)
    config = transformers.BitNetConfig(**{**SMALL, "num_key_value_heads": 2, "initializer_range": 0.3})
    theirs = transformers.BitNetForCausalLM(config).eval()
    ours = small_model("dense", seed=1)
    ours.config.hidden_act = "relu2"
    rebuilt = type(ours)(type(ours.config)(**{**SMALL, **MIXTURES["dense"], "hidden_act": "relu2", "rope_theta": 5e5}))
    rebuilt.load_state_dict(theirs.state_dict() | {"lm_head.weight": theirs.model.embed_tokens.weight})
    rebuilt.lm_head = theirs.lm_head
    padded = small_tokens(3, 12)
    padded[0, :5] = 0
    mask = (padded != 0).long()
    with torch.no_grad():
        a, b = rebuilt.eval()(padded, attention_mask=mask).logits, theirs(padded, attention_mask=mask).logits
    kept = mask.bool()
    torch.testing.assert_close(a[kept], b[kept], rtol=1e-4, atol=1e-4)


def test_loads_through_either_family(tmp_path):
    model, tokens = bitnet(), small_tokens()
    save_packed(model, tmp_path / "packed", torch.float32)
    packed = BitNetForCausalLM.from_pretrained(tmp_path / "packed")
    assert is_packed(packed)
    assert torch.equal(logits(packed, tokens), logits(model, tokens))
    base = BitNetModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(packed.lm_head(base(tokens).last_hidden_state), packed(tokens).logits)
    small_model("ternary-mlp-pre").save_pretrained(tmp_path / "other")
    assert BitNetForCausalLM.from_pretrained(tmp_path / "other").config.feed_forward == "mlp"


def test_the_seeds_transformer():
    torch.manual_seed(0)
    model = BitNetTransformer(num_tokens=200, dim=64, depth=2, dim_head=16, heads=4, ff_mult=4)
    tokens = torch.randint(0, 200, (1, 32))
    out = model(tokens)
    assert out.shape == (1, 32, 200)
    assert out.dtype == torch.float32
    torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 200
    assert torch.equal(model(changed)[:, :20], out[:, :20])
    model.eval()
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 35)
    assert torch.equal(pack(model)(tokens), model(tokens))
    shared = model.to_causal_lm()
    assert shared.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(shared(tokens).logits, model(tokens))
    assert BitNetTransformer(20, 32, 1, 8, 4, 2).config.intermediate_size == 64
