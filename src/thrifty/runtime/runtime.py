import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from thrifty import native
from thrifty.checkpoint import DecoderConfig, Folder, open_model
from thrifty.errors import ThriftyError, ThriftyWarning
from thrifty.runtime.cache import Cache, usable_prefix
from thrifty.runtime.chat_template import PLAIN_CHAT_STOPS, chosen_template, render_chat
from thrifty.runtime.decoder import CACHE_DTYPES, Decoder, make_decoder
from thrifty.runtime.drafting import Drafter, Drafting
from thrifty.runtime.generation import Continuation, Defaults
from thrifty.runtime.prompt_cache import PromptCache
from thrifty.runtime.score import Score, negative_log_likelihood
from thrifty.runtime.text import Ending, pieces, read_tokenizer, until_stop
from thrifty.spec import CHUNK
from thrifty.spec.windows import scoring_windows

WEIGHT_FORMATS = ("auto", "i2", "base3")
HEAD_BITS = (None, 8, 4)


def load(
    path: str | Path,
    *,
    weight_format: str = "auto",
    n_threads: int | None = None,
    max_context: int | None = None,
    head_bits: int | None = None,
    cache_bits: int = 32,
) -> "Runtime":
    """A runtime of a checkpoint (folder, GGUF file, hub id): packed, or latent weights quantised while they are read.

    weight_format: layout of low-bit weights in memory, "i2" (2 bits) or "base3" (1.6 bits); "auto" measures which is
    faster. n_threads: by default the physical cores this process may use, or THRIFTY_NUM_THREADS. max_context:
    positions a sequence may have, by default the model's. head_bits: the output head at 8 or 4 bits, or None for as it
    is stored. cache_bits: keys and values as float32, float16 or 8-bit integers with a scale per position and head;
    without the native library they stay float32.
    With the defaults the runtime computes what torch does; fewer bits are faster and move the logits a little. Warns
    where there are more threads than processors.
    Raises ThriftyError where the folder or an option is invalid.
    """
    folder = open_model(path, native.gguf_decode)
    config = folder.config
    if weight_format not in WEIGHT_FORMATS:
        raise ThriftyError(f"[load] weight_format must be one of {', '.join(WEIGHT_FORMATS)}; got {weight_format!r}")
    if n_threads is not None and (not isinstance(n_threads, int) or n_threads < 1):
        raise ThriftyError(f"[load] n_threads must be an integer of at least 1; got {n_threads!r}")
    limit = config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= limit:
        raise ThriftyError(f"[load] max_context must be from 1 to the model's {limit} positions; got {max_context}")
    tokenizer = read_tokenizer(folder)
    defaults = Defaults.read(folder)
    if head_bits not in HEAD_BITS:
        raise ThriftyError(f"[load] head_bits must be 8, 4 or None; got {head_bits!r}")
    if cache_bits not in CACHE_DTYPES:
        raise ThriftyError(f"[load] cache_bits must be one of {', '.join(map(str, CACHE_DTYPES))}; got {cache_bits!r}")
    threads = n_threads or native.default_threads()
    if threads > native.cpu_threads():
        warnings.warn(
            f"[load] n_threads is best at most {native.cpu_threads()}, the processors of this process; got {threads}; "
            "results are the same, and slower",
            ThriftyWarning,
            stacklevel=2,
        )
    context = max_context or limit
    try:
        decoder = make_decoder(folder, weight_format, threads, context, head_bits, cache_bits)
    except MemoryError as error:
        raise _no_memory(f"[load] the weights of {folder.path} and {context} positions", error) from error
    return Runtime(decoder, tokenizer, defaults, folder)


class Runtime:
    """A model that is ready to run. `load` makes one.

    Every call has a cache of its own, so that it returns the same tokens whatever ran before.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer | None, defaults: Defaults, folder: Folder) -> None:
        self._decoder = decoder
        #: What turns text into tokens and back; None where the folder has none.
        self.tokenizer = tokenizer
        self._defaults = defaults
        self._folder = folder

    @property
    def config(self) -> DecoderConfig:
        """Sizes and choices of the model."""
        return self._decoder.config

    @property
    def max_context(self) -> int:
        """Positions that a prompt and its continuation may have together."""
        return self._decoder.max_context

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads."""
        return self._decoder.bytes_per_token

    @property
    def start_token(self) -> int | None:
        """The token that begins a sequence: that of its beginning or of its end; None where the model names neither."""
        if self._defaults.bos is not None and self._defaults.bos < self.config.vocab_size:
            return self._defaults.bos
        return min(self._defaults.eos, default=None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the special tokens that the tokenizer adds."""
        return self._ids(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return self._tokenizer_or_error().decode(list(tokens), skip_special_tokens=True)

    def generate(self, prompt: str | Sequence[int], **options) -> str:
        """The continuation of `prompt`, without the prompt. Options are those of `stream`."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str | Sequence[int], *, stop: str | Sequence[str] = (), **options) -> Iterator[str]:
        """The continuation of `prompt` in pieces of text, as it is made; pieces are whole characters.

        stop: strings that end the text and are left out. Other options are those of `stream_tokens`.
        """
        return self.text_of(self.stream_tokens(prompt, **options), stop)

    def text_of(self, tokens: Iterable[int], stop: str | Sequence[str] = ()) -> Iterator[str]:
        """Text of tokens in pieces, as they come: whole characters, up to the first of the strings `stop`."""
        stops = [stop] if isinstance(stop, str) else list(stop)
        return until_stop(pieces(self._tokenizer_or_error(), tokens), [s for s in stops if s])

    def generate_tokens(self, prompt: str | Sequence[int], **options) -> list[int]:
        """The continuation of `prompt` as token ids. Options are those of `stream_tokens`."""
        return list(self.stream_tokens(prompt, **options))

    def stream_tokens(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | np.random.Generator | None = None,
        ignore_eos: bool = False,
        cache: Cache | None = None,
        prompt_cache: str | Path | None = None,
        draft: int | Drafting = 0,
    ) -> Iterator[int]:
        """The continuation of `prompt` (a text, or token ids), token by token; an end-of-sequence token ends it.

        Options left out are those of generation_config.json. temperature 0 takes the most likely token; a seed, or a
        generator, makes sampling repeatable. max_new_tokens left out is also cut to the room in the context. cache: one
        of `new_cache`, whose prefix shared with the prompt is not computed again. prompt_cache: the same in a file,
        which is made where it is missing, and holds the prompt from now on where that is longer than what it held.
        draft: most tokens to guess at a time from what was said before, or a `Drafting` that counts them; the tokens
        are the same, and come faster where the text repeats itself (`thrifty.runtime.drafting`). Models with mixers
        other than attention keep states, which cannot take a token back: they never draft, and they read a prompt
        anew unless it begins with all that the cache, or the file, has read.
        Raises ThriftyError where prompt and max_new_tokens exceed the context, an option is out of range, or a cache
        is not of this model.
        """
        run = self._begin(prompt, max_new_tokens, seed, ignore_eos, temperature, top_k, top_p, repetition_penalty)
        cache = self._cache_for(run) if cache is None else cache
        if cache.owner is not self._decoder:
            raise ThriftyError("[generate] a cache must be of this runtime; got another's; make one with new_cache")
        file = None if prompt_cache is None else PromptCache(prompt_cache, self._folder, cache)
        drafting = draft if isinstance(draft, Drafting) else Drafting(draft)
        return self._tokens(run, cache, file, Drafter(drafting, self._decoder.most_rows - 1))

    def save_prompt(self, path: str | Path, prompt: str | Sequence[int]) -> int:
        """Compute a prompt and write its keys and values to a file, for `prompt_cache` of later calls and processes.

        Returns its number of tokens. A file that is there is used, and replaced. Raises ThriftyError where it is no
        prompt cache of this model and cache_bits.
        """
        tokens = self._prompt(prompt)
        cache = self._new_cache(len(tokens))
        self._read_prompt(tokens, cache, PromptCache(path, self._folder, cache), replace=True)
        return len(tokens)

    def generate_batch(self, prompts: Sequence[str | Sequence[int]], **options) -> list[str]:
        """The continuations of several prompts, made together: reading the weights once a step serves them all.

        Each is what `generate` gives for its prompt alone. Options are those of `generate`, without a cache.
        """
        stop = options.get("stop", ())
        return ["".join(self.text_of(tokens, stop)) for tokens in self.generate_tokens_batch(prompts, **options)]

    def generate_tokens_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | np.random.Generator | None = None,
        ignore_eos: bool = False,
        stop: str | Sequence[str] = (),
    ) -> list[list[int]]:
        """`generate_batch` as token ids: each list is what `generate_tokens` gives for its prompt alone.

        stop: strings that end a text; the token that completes one is its last.
        """
        choice = (temperature, top_k, top_p, repetition_penalty)
        runs = [self._begin(prompt, max_new_tokens, seed, ignore_eos, *choice) for prompt in prompts]
        stops = [stop] if isinstance(stop, str) else list(stop)
        if any(stops):
            for run in runs:
                run.ends = Ending(self._tokenizer_or_error(), stops)
        most = self._decoder.most_sequences
        for start in range(0, len(runs), most):
            self._run_together(runs[start : start + most])
        return [run.made for run in runs]

    def room(self, prompt: str | Sequence[int]) -> int:
        """Tokens that may follow a prompt: the last one is returned, not read, and needs no position."""
        return self.max_context - len(self._prompt(prompt)) + 1

    def new_cache(self) -> Cache:
        """A cache for the whole context, for calls that share a prefix (the turns of a chat)."""
        return self._new_cache(self.max_context)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [T, vocab] after each of the T tokens, given those before it."""
        tokens = self._prompt(tokens)
        return np.concatenate(list(self._decoder.logits(tokens, self._new_cache(len(tokens)))))

    def perplexity(self, text: str, window: int | None = None, stride: int | None = None) -> float:
        """exp(mean negative log-likelihood per token) of a text, in windows as `score` has them."""
        return self.score(text, window, stride).perplexity

    def bits_per_byte(self, text: str, window: int | None = None, stride: int | None = None) -> float:
        """Negative log2-likelihood of a text over its bytes in UTF-8, in windows as `score` has them."""
        return self.score(text, window, stride).bits_per_byte

    def score(
        self,
        text: str,
        window: int | None = None,
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Score:
        """Negative log-likelihood of a text.

        Windows of `window` tokens (by default the context) advance by `stride` (by default half a window); a token is
        scored once, with all that is left of it in the first window it is in. The first token is predicted from the
        beginning-of-sequence token, or the end-of-sequence token; a model that has neither pays log2(vocabulary).
        progress: called with the tokens scored so far and all of them. Raises ThriftyError where the text has no token,
        or 1 <= stride <= window <= context does not hold.
        """
        window = self.max_context if window is None else window
        stride = max(1, window // 2) if stride is None else stride
        if not 1 <= stride <= window <= self.max_context:
            raise ThriftyError(
                f"[perplexity] 1 <= stride <= window <= {self.max_context} (the context) must hold; got stride "
                f"{stride} and window {window}"
            )
        tokens = self._ids(text, add_special_tokens=False)
        if not tokens:
            raise ThriftyError("[perplexity] the text must have at least one token; got none")
        start = self.start_token
        nats = math.log(self.config.vocab_size) if start is None else 0.0
        read = np.array(tokens if start is None else [start, *tokens])
        for begin, scored, stop in scoring_windows(len(read), window, stride):
            inputs = read[begin : stop - 1].tolist()
            at = begin + 1  # the position that the next row of logits predicts
            for logits in self._decoder.logits(inputs, self._new_cache(len(inputs))):
                skip = min(max(0, scored - at), len(logits))
                nats += negative_log_likelihood(logits[skip:], read[at + skip : at + len(logits)])
                at += len(logits)
            if progress is not None:
                progress(stop - (len(read) - len(tokens)), len(tokens))
        return Score(nats, len(tokens), len(text.encode()))

    def log_likelihood(self, tokens: Sequence[int], count: int, cache: Cache | None = None) -> tuple[float, bool]:
        """log p of the last `count` tokens given those before them, in nats, and whether each of them is the likeliest.

        cache: one of `new_cache`; what the sequences of several calls begin with alike is computed once. Raises
        ThriftyError where 1 <= count < len(tokens) does not hold, or all but the last exceed the context.
        """
        if not 1 <= count < len(tokens):
            raise ThriftyError(f"[log_likelihood] 1 <= count < {len(tokens)} (the tokens) must hold; got {count}")
        inputs, (last,) = self._prompt(tokens[:-1]), self._prompt(tokens[-1:])
        targets = np.array([*inputs[len(inputs) - count + 1 :], last])
        cache = self._new_cache(len(inputs)) if cache is None else cache
        first = len(inputs) - count  # the input whose logits predict the first target
        shared = cache.keep_prefix(inputs[: first + 1])
        if shared < first:
            self._decoder.advance(inputs[shared:first], cache)
        nats, done, likeliest = 0.0, 0, True
        for logits in self._decoder.logits(inputs[first:], cache):
            expected = targets[done : done + len(logits)]
            nats += negative_log_likelihood(logits, expected)
            likeliest = likeliest and bool((logits.argmax(-1) == expected).all())
            done += len(logits)
        return -nats, likeliest

    def chat_prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], list[str]]:
        """Tokens that ask for the assistant's answer to `messages`, and the strings that end it.

        messages: {"role": "system" | "user" | "assistant", "content": text} in order. The checkpoint's chat template
        makes the prompt; without one it is plain "User: ..." blocks. Raises ThriftyError where the template, other
        than that of models trained here, needs jinja2, which is not installed, or does not take the messages.
        """
        template = self._chat_template()
        text = render_chat(messages, template, self._folder.json("tokenizer_config.json"))
        stops = PLAIN_CHAT_STOPS if template is None else []
        return self._ids(text, add_special_tokens=False), stops

    def _chat_template(self) -> str | None:
        beside = self._folder.text("chat_template.jinja")
        if beside is not None:
            return beside
        return chosen_template(self._folder.json("tokenizer_config.json").get("chat_template"))

    def _begin(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None,
        seed: int | np.random.Generator | None,
        ignore_eos: bool,
        *choice,
    ) -> Continuation:
        """choice: temperature, top_k, top_p and repetition_penalty, None where the model's default holds."""
        tokens = self._prompt(prompt)
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: value for name, value in zip(names, choice, strict=True) if value is not None}
        sampling = replace(self._defaults.sampling, **given)
        stops = frozenset() if ignore_eos else self._defaults.eos
        return Continuation(tokens, self._room(tokens, max_new_tokens), sampling, np.random.default_rng(seed), stops)

    def _cache_for(self, run: Continuation) -> Cache:
        capacity = -(-(len(run.seen) + run.count) // CHUNK) * CHUNK
        return self._new_cache(min(capacity, self.max_context))

    def _new_cache(self, positions: int) -> Cache:
        try:
            cache = self._decoder.new_cache(positions)
        except MemoryError as error:
            raise _no_memory(f"[generate] keys and values of {positions} positions", error) from error
        cache.owner = self._decoder
        return cache

    def _read_prompt(
        self, tokens: list[int], cache: Cache, file: PromptCache | None, replace: bool = False
    ) -> np.ndarray:
        """Logits after a prompt; what the file or the cache has of it is not computed again.

        The file gets the prompt where that is longer than what it held, or with `replace`. Where there are states,
        it gets one only where it is new, for a longer text would serve fewer prompts, and without the last token, so
        that the prompt itself can be read again from there.
        """
        if file is not None:
            file.restore(cache, tokens)
        shared = cache.keep_prefix(tokens)
        if file is None:
            return self._decoder.advance(tokens[shared:], cache)
        stateful = cache.layout.stateful
        if not stateful or not (replace or not file.tokens) or len(tokens) == 1:
            logits = self._decoder.advance(tokens[shared:], cache)
            if not stateful and (replace or len(tokens) > len(file.tokens)):
                file.save(cache, len(tokens))
            return logits
        if shared < len(tokens) - 1:
            self._decoder.advance(tokens[shared:-1], cache)
        file.save(cache, len(tokens) - 1)
        return self._decoder.advance(tokens[-1:], cache)

    def _tokens(self, run: Continuation, cache: Cache, file: PromptCache | None, drafter: Drafter) -> Iterator[int]:
        if run.finished:
            return
        rows, proposal = [self._read_prompt(run.seen, cache, file)], []
        while True:
            for logits, expected in zip(rows, [*proposal, None], strict=True):
                if (token := run.take(logits)) is None:
                    return
                if token == expected:
                    drafter.accept()
                yield token
                if run.finished:
                    return
                if token != expected:
                    break
            # Of a draft, the cache has positions that turned out otherwise.
            del cache.tokens[len(run.seen) - 1 :]
            proposal = drafter.propose(run.seen, run.count - len(run.made) - 1)
            if proposal:
                rows = np.concatenate(list(self._decoder.logits([run.seen[-1], *proposal], cache)))
            else:
                rows = [self._decoder.advance(run.seen[-1:], cache)]

    def _run_together(self, runs: Sequence[Continuation]) -> None:
        """Take several continuations to their ends, a step for all that are not there yet."""
        active = [(run, self._cache_for(run)) for run in runs if not run.finished]
        for i, (run, cache) in enumerate(active):
            self._copy_prefix(run.seen, cache, [other for _, other in active[:i]])
            run.take(self._read_prompt(run.seen, cache, None))
        while active := [(run, cache) for run, cache in active if not run.finished]:
            logits = self._decoder.advance_batch([run.seen[-1] for run, _ in active], [cache for _, cache in active])
            for (run, _), row in zip(active, logits, strict=True):
                run.take(row)

    def _copy_prefix(self, tokens: list[int], cache: Cache, others: Sequence[Cache]) -> None:
        """Take over from the cache that begins most like `tokens` what they share: it is computed once."""
        shared, nearest = max(
            ((usable_prefix(c.layout, c.tokens, tokens), c) for c in others), key=lambda x: x[0], default=(0, cache)
        )
        if shared:
            cache.restore(tokens[:shared], nearest.arrays(shared))

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, checked; an empty one begins a new sequence."""
        tokens = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        start = self.start_token
        if not tokens and start is not None:
            tokens = [start]
        if not tokens:
            raise ThriftyError("[generate] the prompt must have a token, for the model names no first one; got none")
        wrong = next((token for token in tokens if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise ThriftyError(f"[generate] tokens must be from 0 to {self.config.vocab_size - 1}; got {wrong}")
        if len(tokens) > self.max_context:
            raise ThriftyError(
                f"[generate] a prompt may have {self.max_context} tokens (the context); got {len(tokens)}; shorten it"
            )
        return tokens

    def _room(self, tokens: list[int], max_new_tokens: int | None) -> int:
        room = self.room(tokens)
        if max_new_tokens is None:
            return min(self._defaults.max_new_tokens, room)
        if max_new_tokens < 0:
            raise ThriftyError(f"[generate] max_new_tokens must be at least 0; got {max_new_tokens}")
        if max_new_tokens > room:
            raise ThriftyError(
                f"[generate] prompt and new tokens must fit the context of {self.max_context}; got {len(tokens)} and "
                f"{max_new_tokens}; shorten the prompt or lower max_new_tokens to {room}"
            )
        return max_new_tokens

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = ascii(text[error.start])
            raise ThriftyError(f"[tokenizer] a text must be characters that UTF-8 has; got {got}; remove it") from error
        return self._tokenizer_or_error().encode(text, add_special_tokens=add_special_tokens).ids

    def _tokenizer_or_error(self) -> Tokenizer:
        if self.tokenizer is None:
            self._folder.text("tokenizer.json")  # of a vocabulary that is not read here it says why
            raise ThriftyError(
                f"[tokenizer] text needs a tokenizer; {self._folder.path} has no tokenizer.json; give token ids to "
                "generate_tokens or stream_tokens"
            )
        return self.tokenizer


def _no_memory(what: str, error: MemoryError) -> ThriftyError:
    return ThriftyError(f"{what} must fit in memory; {str(error) or 'they do not'}; give a smaller context")
