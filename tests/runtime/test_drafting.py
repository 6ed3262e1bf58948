from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError, native
from thrifty.runtime import Conversation, Drafting, load
from thrifty.runtime.drafting import Drafter

SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.02}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


@pytest.fixture(scope="module", params=[8, 16, 32])
def runtime(request, path):
    """Of a random model whose greedy text soon repeats itself."""
    return load(path, cache_bits=request.param, head_bits=8 if request.param == 8 else None)


@pytest.mark.parametrize("draft", [1, 2, 7, 40])
@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_change_no_token(runtime, draft, options):
    counted = Drafting(draft)
    for seed, prompt in enumerate([[1, 2, 3], [7, 8, 9, 10] * 8, [5]]):
        given: dict[str, Any] = {"max_new_tokens": 150, "ignore_eos": True, "seed": seed, **options}
        expected = runtime.generate_tokens(prompt, **given)
        assert runtime.generate_tokens(prompt, draft=counted, **given) == expected
    if native.available():
        assert 0 < counted.accepted < counted.proposed


@pytest.mark.skipif(not native.available(), reason="without the library nothing is drafted")
def test_a_text_that_repeats_takes_fewer_steps(path, monkeypatch):
    runtime = load(path)
    prompt, options = [3, 1, 4, 1], {"max_new_tokens": 200, "ignore_eos": True}
    made = runtime.generate_tokens(prompt, **options)
    # The model's own loop, and then what it says to it.
    steps, logits, advance = [], runtime._decoder.logits, runtime._decoder.advance
    monkeypatch.setattr(runtime._decoder, "logits", lambda t, c: (steps.append(len(t)), logits(t, c))[1])
    monkeypatch.setattr(runtime._decoder, "advance", lambda t, c: (steps.append(len(t)), advance(t, c))[1])
    drafting = Drafting(8)
    assert runtime.generate_tokens(prompt + made, draft=drafting, max_new_tokens=200, ignore_eos=True)
    assert len(steps) < 100
    assert max(steps[1:]) == 9
    # Every token is the choice of one row: the drafted ones accepted, and one a step.
    assert drafting.accepted + len(steps) == 200


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_a_draft_goes_neither_past_the_count_nor_past_the_context(path, count):
    runtime = load(path, max_context=30)
    prompt = [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1]
    options: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": count}
    assert runtime.generate_tokens(prompt, draft=16, **options) == runtime.generate_tokens(prompt, **options)


def test_an_end_token_within_a_draft_ends_the_text(path, tmp_path):
    made = load(path).generate_tokens([1, 2, 3], max_new_tokens=150, ignore_eos=True)
    for end in set(made[-20:]):
        ends = load(write_checkpoint(tmp_path / str(end), tie_word_embeddings=False, eos_token_id=end).path)
        prompt = [*made[: made.index(end)], end] * 2
        assert ends.generate_tokens(prompt, draft=9) == ends.generate_tokens(prompt)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_a_step_of_several_positions_has_the_bits_of_several_steps(path, n_threads):
    for bits in (32, 16, 8):
        decoder = load(path, cache_bits=bits, n_threads=n_threads)._decoder
        rows = min(32, decoder.most_rows)
        for first in (1, 250, 520):
            tokens = [i * 11 % 300 for i in range(first + rows)]
            together, apart = decoder.new_cache(700), decoder.new_cache(700)
            for cache in (together, apart):
                decoder.advance(tokens[:first], cache)
            expected = np.stack([decoder.advance([token], apart) for token in tokens[first:]])
            np.testing.assert_array_equal(np.concatenate(list(decoder.logits(tokens[first:], together))), expected)


def test_a_conversation_goes_on_after_drafts(runtime):
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    plain, drafted = Conversation(runtime, "S", **options), Conversation(runtime, "S", draft=6, **options)
    for text in ("hi hi hi hi", "hi hi hi hi", "again"):
        stream, other = plain.ask(text), drafted.ask(text)
        assert [next(stream), next(stream)] == [next(other), next(other)]
        if text == "again":
            assert list(stream) == list(other)
        # An answer that is left in the middle of a draft is what was said of it.
        stream.close()
        other.close()


def test_what_followed_the_longest_ngram_is_proposed():
    def proposal(seen, longest, room=100):
        drafter = Drafter(Drafting(2 * longest), 2 * longest)
        return drafter.propose(seen, room)

    assert proposal([1, 2, 8, 9, 5, 1, 2], 2) == [8, 9]
    assert proposal([1, 2, 8, 9, 5, 1, 2], 4) == [8, 9, 5, 1]
    assert proposal([1, 2, 8, 9, 5, 1, 2], 4, room=1) == [8]
    assert proposal([3, 4, 1, 2, 7, 6, 1, 2, 8, 3, 4, 1, 2], 1) == [7]
    assert proposal([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    assert proposal([1, 2, 3], 4) == []
    assert proposal([1], 4) == []


def test_drafts_that_miss_become_short_and_rare():
    drafting = Drafting(16)
    drafter, tokens = Drafter(drafting, 31), np.random.default_rng(0).integers(0, 20, 3000).tolist()
    at, drafts = 100, []
    while at < len(tokens):
        proposal, held = drafter.propose(tokens[:at], 100), 0
        while held < len(proposal) and at + held < len(tokens) and proposal[held] == tokens[at + held]:
            drafter.accept()
            held += 1
        drafts += [len(proposal)] if proposal else []
        at += held + 1
    assert sum(drafts) == drafting.proposed < 0.2 * len(tokens)
    assert np.median(drafts[5:]) == 1


def test_a_negative_number_is_refused(runtime):
    with pytest.raises(ThriftyError, match="draft must be"):
        runtime.generate([1], draft=-1)
