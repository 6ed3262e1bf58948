"""The runtime against torch on random models: teacher-forced logits, and free-running greedy tokens.

Both feed the same integers to the same products, and evaluation in torch takes softmax and activations from the library
that the runtime uses, so that no code moves: only the output head adds in another order.
"""

import json
from typing import Any

import numpy as np
import pytest

from thrifty.runtime import Runtime, load

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

DOGE = {"token_mixers": "dynamic_mask", "keep_window_size": 50, "qk_norm": True, "residual": "scaled"}
EXPERTS = {"feed_forward": "cdmoe", "num_experts": 256, "num_experts_per_tok": 8}
KEY_HEADS = {"router": "product_key_heads", "num_experts_heads": 2, "norm_topk_prob": True}
VARIANTS = {
    "bitnet": {},
    "untied-relu2": {"tie_word_embeddings": False, "hidden_act": "relu2"},
    "pre-mlp": {"norm_placement": "pre", "feed_forward": "mlp", "hidden_act": "gelu"},
    "binary-bias": {"linear": "binary", "attention_bias": True},
    "dense": {"linear": "dense"},
    "matmulfree": {"token_mixers": "mlgru", "attention_bias": True},
    "doge": {**DOGE, "linear": "dense", "norm_placement": "pre"},
    "doge-all-keys": {**DOGE, "linear": "dense", "norm_placement": "pre", "dynamic_mask_selection": "none"},
    "doge-heads": {
        "token_mixers": "dynamic_mask",
        "keep_window_size": 50,
        "dt_heads": "attention",
        "attention_bias": True,
    },
    "doge-moe": {**DOGE, **EXPERTS, "linear": "dense", "norm_placement": "pre"},
    "doge-moe-heads": {**DOGE, **EXPERTS, **KEY_HEADS, "linear": "dense", "mlp_bias": True},
    "doge-ternary": DOGE,
    "cheems": {**DOGE, "linear": "dense", "norm_placement": "pre", "token_mixers": ["ssd", "ssd", "dynamic_mask"]},
    "mixture": {
        **DOGE,
        **EXPERTS,
        "token_mixers": ["attention", "mlgru", "ssd", "dynamic_mask"],
        "num_hidden_layers": 4,
    },
    "qwen": {
        "norm_placement": "pre",
        "attention_bias": True,
        "attention_out_bias": False,
        "attention_qk_norm": True,
    },
    "normed-linears": {
        **DOGE,
        "token_mixers": ["attention", "mlgru", "ssd", "dynamic_mask"],
        "num_hidden_layers": 4,
        "linear_norm_eps": 1e-6,
    },
    "ugly": {"head_dim": 18, "intermediate_size": 250, "num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module", params=VARIANTS)
def models(request, tmp_path_factory) -> tuple:
    """A random model in torch (latent, on the training path) and its packed folder in the runtime."""
    from thrifty.models import ThriftyConfig, ThriftyForCausalLM, round_dense_parameters, save_packed

    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 300}
    model = ThriftyForCausalLM(ThriftyConfig(**(sizes | VARIANTS[request.param]))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "residual" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith(".A"):
                parameter.uniform_(-2, -0.2)
    round_dense_parameters(model)
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_packed(model, folder)
    return model, load(folder)


def torch_logits(model, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def check_parity(model, runtime: Runtime, tokens: list[int]) -> None:
    """The best token is the same wherever torch's margin between its two best exceeds 1e-3 of its logit range, and no
    logit is further away than rounding: a moved code would show as 1e-3 of the range and more."""
    theirs, ours = torch_logits(model, tokens), runtime.logits(tokens)
    span = np.ptp(theirs)
    best = np.sort(theirs, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3 * span
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    assert np.abs(ours - theirs).max() < 1e-5 * span


def test_teacher_forced_over_200_positions(models):
    tokens = np.random.default_rng(0).integers(0, 500, 200).tolist()
    model, runtime = models
    check_parity(model, runtime, tokens)


def test_greedy_tokens_agree_while_torch_is_sure(models):
    model, runtime = models
    prompt = [3, 1, 4, 1, 5]
    made = runtime.generate_tokens(prompt, max_new_tokens=60, ignore_eos=True)
    logits = torch_logits(model, prompt + made)[len(prompt) - 1 : -1]
    best = np.sort(logits, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3 * np.ptp(logits)
    np.testing.assert_array_equal(logits.argmax(-1)[clear], np.array(made)[clear])


def test_a_latent_folder_runs_like_its_packed_copy(models, tmp_path):
    model, runtime = models
    model.save_pretrained(tmp_path / "latent")
    tokens = list(range(100))
    np.testing.assert_array_equal(load(tmp_path / "latent").logits(tokens), runtime.logits(tokens))


def test_a_folder_of_transformers_doge_runs_as_it_is(tmp_path):
    from transformers import DogeConfig, DogeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {
        "attn_implementation": "eager",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
    model = DogeForCausalLM(DogeConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    tokens = np.random.default_rng(0).integers(0, 300, 100).tolist()
    for changed in (fields, fields | {"rope_parameters": scaling}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        logits = load(tmp_path).logits(tokens)
        assert np.abs(logits - torch_logits(model, tokens)).max() < 1e-4 * np.ptp(logits)
