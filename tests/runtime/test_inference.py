import sys

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError
from thrifty.runtime import BitNetInference, load


def test_a_packed_folder(tmp_path):
    bitnet = BitNetInference()
    bitnet.load_model(str(write_checkpoint(tmp_path / "model").path))
    text = bitnet.generate("The dog jumped over the ", 40, seed=1)
    assert isinstance(text, str)
    assert text == bitnet.generate("The dog jumped over the ", 40, seed=1)


def test_a_text_longer_than_the_context_goes_on_from_its_last_half(tmp_path):
    path = write_checkpoint(tmp_path / "model", max_position_embeddings=32).path
    bitnet, runtime, prompt = BitNetInference(), load(path), "The dog jumped over the "
    bitnet.load_model(path)
    text = bitnet.generate(prompt, 100, seed=1)
    assert text == bitnet.generate(prompt, 100, seed=1)
    assert len(text) > 40
    rng, window, made = np.random.default_rng(1), runtime.encode(prompt), []
    for count in (9, 17, 17, 17, 17, 17, 6):
        options = {"temperature": 1.0, "top_k": 30, "ignore_eos": True, "seed": rng}
        made += runtime.generate_tokens(window, max_new_tokens=count, **options)
        window = [*runtime.encode(prompt), *made][-16:]
    assert text == "".join(runtime.text_of(made))
    # A longer text is read from its last tokens; a shorter one gives what the runtime alone does.
    assert bitnet.generate("x" * 50 + prompt * 2, 3, seed=2) == bitnet.generate((prompt * 2)[-32:], 3, seed=2)
    assert isinstance(bitnet.generate("", 40, seed=0), str)
    with pytest.raises(ThriftyError, match="at least 0; got -1"):
        bitnet.generate(prompt, -1)


def test_a_folder_of_the_seeds_transformer_speaks_bytes(tmp_path):
    sizes = {"feed_forward": "mlp", "norm_placement": "pre", "hidden_act": "gelu", "tokenizer": False}
    bitnet = BitNetInference()
    bitnet.load_model(write_checkpoint(tmp_path / "bytes", vocab_size=256, **sizes).path)
    assert len(bitnet.generate("The dog jumped over the ", 512, seed=0)) > 0
    bitnet.load_model(write_checkpoint(tmp_path / "few", vocab_size=255, **sizes).path)
    with pytest.raises(ThriftyError, match=r"has no tokenizer\.json"):
        bitnet.generate("a", 1)


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ThriftyError, match="CPU"):
        BitNetInference(device="cuda")
    bitnet = BitNetInference("cpu")
    with pytest.raises(ThriftyError, match="call load_model first"):
        bitnet.generate("a", 1)
    with pytest.raises(ThriftyError, match="does not exist"):
        bitnet.load_model(tmp_path / "none.pth")
    (tmp_path / "a.pth").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ThriftyError, match=r"needs torch.*thrifty\[torch\]"):
        bitnet.load_model(tmp_path / "a.pth")


class TestStateDict:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", exc_type=ImportError)

    @pytest.fixture
    def model(self, torch):
        from thrifty.models import BitNetTransformer

        torch.manual_seed(0)
        return BitNetTransformer(num_tokens=256, dim=48, depth=2, dim_head=16, heads=4, ff_mult=2).eval()

    def test_gives_the_transformers_logits(self, torch, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / "model.pth")
        bitnet = BitNetInference()
        bitnet.load_model(tmp_path / "model.pth", dim_head=16)
        tokens = list(b"The dog jumped over the ")
        with torch.no_grad():
            expected = model(torch.tensor([tokens]))[0].numpy()
        assert bitnet._runtime is not None
        assert bitnet._runtime.encode("The dog jumped over the ") == tokens
        logits = bitnet._runtime.logits(tokens)
        span = expected.max() - expected.min()
        assert abs(logits - expected).max() < 1e-3 * span
        assert len(bitnet.generate("The dog jumped over the ", 30, seed=0)) > 0

    def test_the_seeds_own_sizes(self, torch, tmp_path):
        from thrifty.models import BitNetTransformer

        torch.save(BitNetTransformer(num_tokens=256, dim=64, depth=1, heads=2).state_dict(), tmp_path / "model.pth")
        bitnet = BitNetInference()
        bitnet.load_model(str(tmp_path / "model.pth"))
        assert bitnet.generate("a", 5, seed=0) == bitnet.generate("a", 5, seed=0)

    def test_other_files_are_refused(self, torch, model, tmp_path):
        state = model.state_dict()
        whole = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
        few = {**state, "model.embed_tokens.weight": torch.zeros(20, 48), "lm_head.weight": torch.zeros(20, 48)}
        cases = [
            ({"epoch": 3}, "something else", 16),
            (torch.zeros(3), "something else", 16),
            ({"weight": torch.zeros(3)}, "other names", 16),
            (whole, r"'model\.norm\.weight' is absent", 16),
            (few, "vocabulary is 20", 16),
            (state, "divide the 64 features", 48),
            (model, "state dict", 16),
        ]
        for content, message, dim_head in cases:
            torch.save(content, tmp_path / "model.pth")
            with pytest.raises(ThriftyError, match=message):
                BitNetInference().load_model(tmp_path / "model.pth", dim_head)
        (tmp_path / "model.pth").write_bytes(b"PK\3\4 no zip")
        with pytest.raises(ThriftyError, match=r"model\.pth"):
            BitNetInference().load_model(tmp_path / "model.pth")
