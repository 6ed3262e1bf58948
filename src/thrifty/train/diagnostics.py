"""What a run shows of itself: codes that are zero and codes that moved, rates, speed, and what the model writes."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from thrifty import ops
from thrifty.nn import BitLinear, pack
from thrifty.train.recipe import Training

#: Most looks at the codes in a run.
LOOKS = 50
#: Most times that a run writes samples; not more often than every so many steps.
SAMPLINGS, APART = 8, 50
#: Tokens of a prompt, and most tokens that follow.
PROMPT, CONTINUATION = 16, 48


class Diagnostics(TrainerCallback):
    """Adds to the trainer's log, and so to its history and to TensorBoard; stands before the callbacks that read it.

    With each loss: `adam_learning_rate` and `tokens_per_second` (of the steps alone, without evaluations, checkpoints
    and looks). With a held-out loss: `eval_bits_per_byte`. At a look: `zeros/NAME`, the share of a BitLinear layer's
    codes that are 0, and `flipped/NAME`, the share that changed since the look before. At a sampling, SAMPLINGS times
    in a run: `prompt/N` with its continuations `greedy/N` and `seeded/N`, as text.

    Nothing of it moves a random number or a weight of the run. A look quantises every weight once; there are at most
    LOOKS in a run, or one a checkpoint where these are more, and every checkpoint is at a look: a resumed run compares
    its codes with what an uninterrupted one does.
    """

    def __init__(self, tokenizer: Tokenizer, heldout: Any, training: Training, nats_to_bits_per_byte: float) -> None:
        """heldout: blocks of held-out tokens, whose beginnings are the prompts, or None."""
        self.tokenizer, self.training, self.scale = tokenizer, training, nats_to_bits_per_byte
        blocks = [] if heldout is None else [heldout[i] for i in sorted({0, len(heldout) // 2})]
        self.prompts = [block["input_ids"][:PROMPT].tolist() for block in blocks]
        self.codes: dict[str, Tensor] = {}
        self.found: dict[str, float | str] = {}
        self.rates: dict[str, float] = {}
        #: Steps and seconds since the last log, and when the step began that is being made.
        self.steps, self.seconds, self.began = 0, 0.0, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.codes = {name: codes_of(layer) for name, layer in low_bit_layers(model)}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.began = time.perf_counter()
        # That of the step which is about to be made, as the trainer logs the other one.
        groups = [] if optimizer is None else optimizer.param_groups
        self.rates = {"adam_learning_rate": float(groups[-1]["lr"])} if len(groups) > 1 else {}

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        interval = look_interval(state.max_steps, self.training.save_every)
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        last = state.global_step == state.max_steps
        if last or state.global_step % interval == 0:
            self.found |= self._look(model)
            control.should_log = True
        apart = max(state.max_steps // SAMPLINGS, APART)
        if self.prompts and (last or state.global_step % apart == 0):
            self.found |= self._samples(model)
            control.should_log = True

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        found: dict[str, float | str] = {}
        if "eval_loss" in logs:
            found["eval_bits_per_byte"] = logs["eval_loss"] * self.scale
        if "loss" in logs:
            found |= self.found | self.rates
            if self.steps:
                sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                found["tokens_per_second"] = self.steps * sequences * self.training.sequence_length / self.seconds
            self.found, self.steps, self.seconds = {}, 0, 0.0
        logs.update(found)
        state.log_history[-1].update(found)

    def _look(self, model: nn.Module) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for name, layer in low_bit_layers(model):
            codes = codes_of(layer)
            if layer.kind == "ternary":
                found[f"zeros/{name}"] = 1 - codes.count_nonzero().item() / codes.numel()
            found[f"flipped/{name}"] = (codes != self.codes[name]).count_nonzero().item() / codes.numel()
            self.codes[name] = codes
        return found

    def _samples(self, model: PreTrainedModel) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        made = continuations(model, self.prompts)
        for i, (prompt, (greedy, seeded)) in enumerate(zip(self.prompts, made, strict=True)):
            texts = {"prompt": prompt, "greedy": greedy, "seeded": seeded}
            found |= {f"{k}/{i}": self.tokenizer.decode(t, skip_special_tokens=False) for k, t in texts.items()}
        return found


def look_interval(steps: int, save_every: int) -> int:
    """Steps between two looks: the smallest divisor of `save_every` that makes at most LOOKS of a run."""
    divisors = [d for d in range(1, save_every + 1) if save_every % d == 0]
    return next((d for d in divisors if steps <= LOOKS * d), save_every)


def low_bit_layers(model: Any) -> list[tuple[str, BitLinear]]:
    """The BitLinear layers of a model, by names without the "model." that all of them begin with."""
    return [(n.removeprefix("model."), m) for n, m in model.named_modules() if isinstance(m, BitLinear)]


@torch.no_grad()
def codes_of(layer: BitLinear) -> Tensor:
    """The layer's codes int8 [out, in]."""
    weight = layer.latent()
    # A sharded weight is made whole: its scale is the mean of all of it.
    whole = getattr(weight, "full_tensor", None)
    return ops.quantize_weight(weight if whole is None else whole(), layer.kind)[0]


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Two continuations of each prompt: the likeliest token each time, and one drawn by a generator of its own.

    Prompts have one length.
    """
    device = next(model.parameters()).device
    layers = [layer for _, layer in low_bit_layers(model)]
    plain = all(layer.quantization is None and not hasattr(layer.weight, "full_tensor") for layer in layers)
    # On a CPU, weights quantised once for all tokens make them four times as fast.
    writer = pack(model) if layers and plain and device.type == "cpu" else model
    generator = torch.Generator().manual_seed(0)
    room = int(model.config.max_position_embeddings) - len(prompts[0]) + 1
    rows = [list(prompt) for prompt in prompts for _ in range(2)]
    made: list[list[int]] = [[] for _ in rows]
    tokens, cache, training = torch.tensor(rows, device=device), None, model.training
    writer.eval()
    try:
        for _ in range(min(CONTINUATION, room)):
            output: Any = writer(input_ids=tokens, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1].float().cpu(), output.past_key_values
            chosen = logits.argmax(-1)
            chosen[1::2] = torch.multinomial(logits[1::2].softmax(-1), 1, generator=generator)[:, 0]
            for row, token in zip(made, chosen.tolist(), strict=True):
                row.append(token)
            tokens = chosen[:, None].to(device)
    finally:
        model.train(training)
    end = model.config.eos_token_id
    ended = [until(row, end if isinstance(end, list) else [end]) for row in made]
    return list(zip(ended[::2], ended[1::2], strict=True))


def until(tokens: list[int], ends: Sequence[int | None]) -> list[int]:
    """Tokens before the first that is one of `ends`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
