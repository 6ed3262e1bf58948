from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from tiny_checkpoints import byte_tokenizer, write_checkpoint

from thrifty.errors import ThriftyError
from thrifty.models import CheemsConfig, CheemsForCausalLM, ThriftyForCausalLM
from thrifty.runtime import load
from thrifty.runtime.harness import RuntimeLM

PAIRS = [
    ("A dog has ", "four legs"),
    ("A dog has ", "two wings"),
    ("A dog has ", "four eyes, and no more"),
    ("", "four legs"),
    ("<|end|>A dog has", " four legs"),
    ("A bird that is longer than the context of the model, and so is cut at the left, not at the right", " sings"),
    ("x", "y" * 64),
]
TEXTS = ["", "one", "a text that is longer than one window of sixty-four tokens, and even " * 3]


@pytest.fixture(scope="module", params=["attention", "states"])
def pair(tmp_path_factory, request):
    """A model of the harness over torch, and one over the runtime."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / request.param
    if request.param == "attention":
        path = write_checkpoint(path, max_position_embeddings=64, linear="dense").path
    else:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
        }
        sizes |= {"num_hidden_layers": 2, "attn_layer_period": 2, "max_position_embeddings": 64}
        ends: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
        CheemsForCausalLM(CheemsConfig(**sizes, **ends)).save_pretrained(path)
        byte_tokenizer().save(str(path / "tokenizer.json"))
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **end)
    model = ThriftyForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    wrap: Any = huggingface.HFLM
    return wrap(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=2), RuntimeLM(load(path))


def requests(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_continuations_are_as_likely_as_torch_has_them(pair):
    theirs, ours = (model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for model in pair)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], rel=1e-5, abs=1e-4)
    assert [likeliest for _, likeliest in ours] == [likeliest for _, likeliest in theirs]


def test_what_is_made_greedily_is_the_likeliest(pair):
    _, ours = pair
    tokens = ours.runtime.encode("A dog")
    made = ours.runtime.generate_tokens(tokens, max_new_tokens=5, temperature=0, ignore_eos=True)
    nats, likeliest = ours.runtime.log_likelihood([*tokens, *made], 5)
    assert likeliest
    other = [*made[:-1], (made[-1] + 1) % 256]
    assert ours.runtime.log_likelihood([*tokens, *other], 5) < (nats, False)


def test_whole_texts_are_as_likely_as_torch_has_them(pair):
    asked = [(text,) for text in TEXTS]
    theirs, ours = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True) for model in pair
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[0] == 0 > ours[1] > ours[2]


def test_texts_are_those_that_torch_makes(pair):
    prompts = ["A dog", "A horse and a dog that are cut at the left of the context " * 2, "x"]
    free = {"max_gen_toks": 20, "do_sample": False, "until": []}
    theirs, ours = (
        model.generate_until(requests("generate_until", [(p, dict(free)) for p in prompts])) for model in pair
    )
    assert ours == theirs
    stop = {**free, "until": [ours[0][3:5], ours[1][2]]}
    theirs, ours = (
        model.generate_until(requests("generate_until", [(p, dict(stop)) for p in prompts])) for model in pair
    )
    assert ours == theirs
    assert len(ours[0]) <= 3


def test_a_stop_string_ends_the_work_too(pair):
    runtime = pair[1].runtime
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 100.0, "seed": 1, "ignore_eos": True}
    whole = runtime.generate("A dog", **options)
    stop = next(character for character in whole[2:] if character.isascii())
    (tokens,) = runtime.generate_tokens_batch(["A dog"], **options, stop=stop)
    assert stop in runtime.decode(tokens)
    assert stop not in runtime.decode(tokens[:-1])
    prompts = ["A dog", "x"]
    alone = [runtime.generate(prompt, **options, stop=stop) for prompt in prompts]
    assert runtime.generate_batch(prompts, **options, stop=stop) == alone
    assert len(alone[0]) < len(whole)


def test_repeats_of_a_sampled_text_differ(pair):
    options = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "until": []}
    texts = pair[1].generate_until(requests("generate_until", [("A dog", dict(options))] * 2))
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"max_gen_toks": 64}, "fewer than the 64"), ({"max_gen_toks": 4, "num_beams": 2}, "without num_beams")],
)
def test_what_the_runtime_cannot_make_is_told(pair, options, sentence):
    with pytest.raises(ThriftyError, match=sentence):
        pair[1].generate_until(requests("generate_until", [("x", options)]))


def test_a_continuation_longer_than_the_context_is_told(pair):
    with pytest.raises(ThriftyError, match="1 to 64 tokens"):
        pair[1].loglikelihood(requests("loglikelihood", [("x", "y" * 65)]))


@pytest.mark.parametrize("count", [0, 3])
def test_a_likelihood_needs_a_token_before_it(pair, count):
    with pytest.raises(ThriftyError, match="1 <= count < 3"):
        pair[1].runtime.log_likelihood([1, 2, 3], count)
