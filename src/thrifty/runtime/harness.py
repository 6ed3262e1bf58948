"""A runtime as a model of lm-evaluation-harness (Gao et al., 2021; github.com/EleutherAI/lm-evaluation-harness).

`lm_eval.simple_evaluate(RuntimeLM(load("runs/notes-packed")), tasks=[...])` scores it, and so does `thrifty eval
--tasks`. Needs the extra `harness`, and no torch.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from thrifty.errors import ThriftyError
from thrifty.runtime.runtime import Runtime

#: New tokens where a task does not say, as the harness has it for torch models.
MAX_NEW_TOKENS = 256
#: Texts that are made together.
TOGETHER = 32


class RuntimeLM(TemplateLM):
    """A `Runtime` as the harness asks it: log-likelihoods and texts, cut as `lm_eval.models.huggingface.HFLM` does.

    A context longer than the model's is cut on the left; spaces at the end of a context belong to its continuation; a
    text without a context begins with the start token. Raises ThriftyError for a model without a tokenizer or a start
    token.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        runtime.encode("")
        if runtime.start_token is None:
            raise ThriftyError(
                "[harness] a model must name the token that begins or ends a text; got one without; give its "
                "config.json an eos_token_id"
            )
        self.runtime = runtime
        self.tokenizer: Any = runtime.tokenizer
        #: Positions of a sequence.
        self.max_length = runtime.max_context
        self._start = runtime.start_token
        # One for the whole run, so that repeats of a sampled question differ.
        self._random = np.random.default_rng(0)

    @property
    def eot_token_id(self) -> int:
        """The start token: the runtime itself ends a text at the tokens that end one."""
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with special tokens unless it begins with the start token or they are declined."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tok_decode([self._start]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def tok_decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones too."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows that do not overlap but for one token of context."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self._start, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += nats
        for request, nats in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, or as many tokens as the task allows, of contexts cut on the left."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            _, options = cast(tuple[str, dict[str, Any]], request.args)
            alike.setdefault(repr(options), []).append(i)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for members in alike.values():
                arguments: list[Any] = [requests[i].args for i in members]
                options = self._options(arguments[0][1])
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise ThriftyError(
                        f"[harness] a task's new tokens must be fewer than the {self.max_length} of the context; got "
                        f"{options['max_new_tokens']}; choose another task, or set its max_gen_toks"
                    )
                prompts = [self.tok_encode(context)[-room:] for context, _ in arguments]
                for start in range(0, len(members), TOGETHER):
                    part = slice(start, start + TOGETHER)
                    made = self.runtime.generate_batch(prompts[part], **options)
                    for i, asked, text in zip(members[part], arguments[part], made, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", asked, text)
                    bar.update(len(made))
        return texts

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """What `Runtime.generate_batch` takes, of what a task says."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
        stop = handle_stop_sequences(options.pop("until"), eos=self.tok_decode([self._start]))
        count, samples = options.pop("max_gen_toks"), options.pop("do_sample")
        given_temperature = options.pop("temperature", 1.0)
        unknown = options.keys() - {"top_k", "top_p", "repetition_penalty"}
        if unknown:
            raise ThriftyError(
                f"[harness] the runtime generates without {', '.join(sorted(unknown))}; got a task with it"
            )
        return {
            "stop": stop,
            "max_new_tokens": count,
            "temperature": given_temperature if samples else 0.0,
            "seed": self._random,
            **options,
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p, whether it is the likeliest) of continuations, each after its context."""
        answers = [(0.0, False)] * len(requests)
        cache = self.runtime.new_cache()
        # Neighbours begin alike, and what they share is computed once.
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for i in tqdm(order, desc="log-likelihoods", disable=disable_tqdm):
            text, context, continuation = requests[i]
            if not 1 <= len(continuation) <= self.max_length:
                raise ThriftyError(
                    f"[harness] a continuation must have 1 to {self.max_length} tokens (the context); got "
                    f"{len(continuation)}; choose another task"
                )
            read = (context + continuation)[-(self.max_length + 1) :]
            answers[i] = self.runtime.log_likelihood(read, len(continuation), cache)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[i])
        return answers
