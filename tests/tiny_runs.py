"""What the tests of training share: a text, a recipe of milliseconds, and callbacks put into a run."""

from contextlib import contextmanager

import pytest
from transformers import TrainerCallback

from thrifty.train import trainer
from thrifty.train.corpus import Corpus, Part
from thrifty.train.recipe import find_recipe

TEXT = "".join(f"The {n}th line of a text that counts its lines.\n" for n in range(400))
CORPUS = Corpus("lines", (Part("text", (TEXT,)),), "The last line of a text.\n" * 20)
MICRO = find_recipe("tiny").override(
    vocab_size=280,
    hidden_size=16,
    intermediate_size=32,
    max_position_embeddings=32,
    steps=6,
    batch_size=2,
    sequence_length=16,
    eval_every=4,
    save_every=4,
)


class Interrupt(TrainerCallback):
    """Ends a run after its fifth step, as Ctrl-C does."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@contextmanager
def with_callback(callback: TrainerCallback):
    """Runs begun in the block have the callback too."""
    original = trainer.CausalTrainer.__init__

    def init(self, *, callbacks, **kwargs):
        original(self, callbacks=[*callbacks, callback], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.CausalTrainer, "__init__", init)
        yield
