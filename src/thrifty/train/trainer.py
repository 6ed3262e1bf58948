"""Training on the Hugging Face Trainer: text and a recipe in, a folder with a trained model out."""

import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

import thrifty
from thrifty.checkpoint import UnwritableError
from thrifty.errors import ThriftyError
from thrifty.models import ThriftyForCausalLM, round_dense_parameters
from thrifty.train.checkpoints import CHECKPOINTS, checkpoint_to_resume, clear_run, read_record, seal, write_record
from thrifty.train.corpus import Corpus
from thrifty.train.curve import plot
from thrifty.train.diagnostics import Diagnostics
from thrifty.train.distillation import Distillation, load_teacher
from thrifty.train.distributed import from_first, join
from thrifty.train.divergence import check_loss, check_weights
from thrifty.train.evaluate import bits_per_byte
from thrifty.train.event_files import event_files
from thrifty.train.initial import initialize, new_model
from thrifty.train.optimizer import Schedule, build_optimizer
from thrifty.train.packing import training_blocks
from thrifty.train.process import is_first, sequences_at_once, world_size
from thrifty.train.progress import ProgressBar, quiet
from thrifty.train.recipe import Recipe, Training
from thrifty.train.report import Report
from thrifty.train.sharding import Sharded, gathered_bytes, shard, whole_model
from thrifty.train.start import Given, copy_texts, fit_sub_norms, load_start, low_bit_model, open_given
from thrifty.train.stream import StreamedBlocks
from thrifty.train.tokenizer import save_tokenizer, tokenizer_json
from thrifty.train.warmup import QuantizationWarmup

#: Sequences on which inserted norms are fitted.
SAMPLE = 8


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind."""

    model: ThriftyForCausalLM
    tokenizer: Tokenizer
    #: The trainer's log: dicts with `step` and `loss` or `eval_loss`.
    history: list[dict[str, float]]
    #: What `training.json` holds.
    record: dict[str, Any]


class CausalTrainer(Trainer):
    """The Trainer with this package's optimizer and schedule, and a sentence when a checkpoint cannot be written."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        training: Training,
        tokenizer: Tokenizer,
        since: float,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ):
        self.latent, self.training, self.tokenizer, self.distillation = model, training, tokenizer, distillation
        #: When the seconds not logged yet began.
        self.since = since
        super().__init__(model=model, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.latent, self.training)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = Schedule(optimizer or self.optimizer, num_training_steps, self.training)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss on the text and, in training, what a teacher adds to it."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs: Any
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # The text's loss is scaled so where its tokens are counted on all devices.
        scale = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = loss + scale * self.distillation.loss(inputs, outputs.logits, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the seconds the run has taken; a resumed run counts on from its checkpoint."""
        if self.distillation is not None and "loss" in logs:
            logs |= self.distillation.report(self.args.gradient_accumulation_steps)
        now = time.perf_counter()
        logs["seconds"] = seconds_of(self.state.log_history) + now - self.since
        self.since = now
        super().log(logs, *args, **kwargs)

    def training_step(self, model, inputs, *args: Any):
        loss = super().training_step(model, inputs, *args)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        output = Path(str(self.args.output_dir)).parent
        check_loss(loss, self.state.global_step + 1, inputs, rates, self.tokenizer, output)
        return loss

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, StreamedBlocks):
            batches = self.state.global_step * self.args.gradient_accumulation_steps
            self.train_dataset.save(Path(output_dir), batches)

    def _save_checkpoint(self, model, trial):
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        check_weights(self.latent, self.state.global_step)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
        except Exception as problem:
            # What was cut off must not be taken for a checkpoint.
            shutil.rmtree(folder, ignore_errors=True)
            reason = problem.reason if isinstance(problem, UnwritableError) else problem
            if "inline_container" in str(problem):
                # torch.save says where its archive ends, and not why.
                reason = "a file was cut off, as on a full disk"
            way_out = "free some space and repeat the command to go on from the checkpoint before"
            raise ThriftyError(f"[train] {folder} could not be written: {reason}; {way_out}") from problem


class ShardedTrainer(Sharded, CausalTrainer):
    """`CausalTrainer` of a model that is spread over processes."""


def train(
    corpus: Corpus,
    recipe: Recipe,
    output: Path,
    *,
    start: str | Path | None = None,
    teacher: str | Path | None = None,
    tokenizer: str | Path | None = None,
    resume: bool | None = None,
    max_minutes: float | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train the recipe's model on the corpus and leave it in `output`.

    start: a folder or hub id of a model to go on from instead, which keeps its tokenizer; dense linears become ternary,
    packed ones trainable. teacher: of one to learn from, with the same tokenizer. tokenizer: a folder, tokenizer.json
    or hub id of one to read the text with.

    `output` gets the model with its latent weights, the tokenizer, `training.json` (settings, text, versions, bits per
    byte), `loss.png`, TensorBoard's `logs/` and resumable `checkpoints/`. A folder that already holds checkpoints of
    the same run is resumed, to the weights that an uninterrupted run gives; `resume` True insists on it, False starts
    anew. `max_minutes` lowers the number of steps, before the first one, to what fits, by timing a few.

    Dense parameters are rounded to bf16 at the end, so that packing loses nothing.

    Every process of a launcher calls this with the same arguments, and computes its share of each batch. The first one
    writes; the results are the same, but for the model of a sharded run (`training.sharding`), whole on the first only.

    Errors: a batch that the processes do not divide, an empty or too short text, a folder that holds another run, a
    damaged checkpoint, a full disk.
    """
    console = console or Console(stderr=True, quiet=not is_first())
    sharded = recipe.training.sharding != "none"
    sequences_at_once(recipe.training.batch_size, recipe.training.accumulate)
    join(sharded)
    given = open_given(start, teacher, recipe.training, tokenizer)
    settings = {"recipe": asdict(recipe), "corpus": corpus.record(), "max_minutes": max_minutes}
    settings |= {"start": start and str(start), "teacher": teacher and str(teacher)}
    settings |= {"tokenizer": tokenizer and str(tokenizer)}
    checkpoint = from_first(lambda: checkpoint_to_resume(output, settings, resume))
    set_seed(recipe.training.seed)
    model, pieces, original = _model(corpus, recipe, given, output if checkpoint else None)
    compiled = recipe.training.compile and not sharded and can_compile()
    if compiled:
        model.compile_layers()
    started = time.perf_counter()
    guide = _teacher(given)
    before = read_record(output) if checkpoint else {}
    training = from_first(lambda: _in_time(model, guide, recipe.training, max_minutes, before))
    _greet(console, corpus, recipe, training, model, output, checkpoint)
    if compiled:
        console.print("        the first step takes half a minute: the layers are compiled")
    blocks, glance, scale = training_blocks(corpus, training, pieces, int(model.config.bos_token_id or 0))
    distillation = None
    if guide is not None:
        console.print(f"[bold]teacher[/] {given.teacher}: {guide.num_parameters() / 1e6:.2f} M parameters")
        distillation = Distillation(model, guide, training, has_fast_bf16())
        if distillation.why_no_relations is not None:
            console.print(f"        its logits alone: {distillation.why_no_relations}")
    # Everything fits: only now is the folder touched.
    if checkpoint is None:
        from_first(lambda: clear_run(output, fresh=resume is False))
        if original is not None:
            sample = [blocks[i]["input_ids"] for i in range(min(len(blocks), SAMPLE))]
            fit_sub_norms(model, original, torch.stack(sample).to(model.device))
    # It shares its tensors with the model that is trained.
    del original
    from_first(lambda: _begin(output, given, pieces, model, settings, training))
    make, kind = CausalTrainer, type(model)
    if sharded:
        make = ShardedTrainer
        shard(model, two_bits=training.sharding == "fsdp-2bit")
        sent, floats = (f"{size / 1e6:.2f} MB" for size in gathered_bytes(model))
        console.print(f"        sharded: a forward pass gathers {sent} of weights, which are {floats} as floats")
    diagnostics = Diagnostics(pieces, glance, training, scale)
    report = Report(output, console)
    with quiet(), ExitStack() as stack:
        # What decides when there is a log, and looks at sharded weights, is the same on all processes.
        callbacks: list[TrainerCallback] = [QuantizationWarmup(model, training), diagnostics]
        if is_first():
            events = stack.enter_context(event_files(output / "logs"))
            callbacks += [stack.enter_context(ProgressBar(console, scale)), events, report]
        trainer = make(
            training=training,
            tokenizer=pieces,
            since=started,
            distillation=distillation,
            model=model,
            args=_arguments(training, output, glance is not None),
            train_dataset=blocks,
            eval_dataset=glance,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        _run(trainer, checkpoint)
    if distillation is not None:
        distillation.close()
    # The trainer wraps the model's forward in autocast; what it leaves computes as the saved model does.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if sharded:
        model = whole_model(model, kind)
    if is_first() or not sharded:
        round_dense_parameters(model)
    history = trainer.state.log_history
    precision = "bfloat16" if trainer.args.bf16 else "float32"
    record = {"settings": settings, "finished": True, "steps": training.steps, "precision": precision}
    record = from_first(lambda: _finish(output, model, pieces, corpus, training, report, history, record))
    return TrainingResult(model, pieces, history, record)


def _begin(output: Path, given: Given, tokenizer: Tokenizer, model, settings, training: Training) -> None:
    """What the folder of a run holds before its first step."""
    if given.folder is None:
        save_tokenizer(tokenizer, output, model.config.max_position_embeddings)
    else:
        copy_texts(given.folder, output)
    write_record(output, {"settings": settings, "finished": False, "steps": training.steps})


def _finish(
    output: Path, model, tokenizer, corpus: Corpus, training: Training, report: Report, history, record
) -> dict[str, Any]:
    """Save and judge the trained model; returns the whole record."""
    with quiet():
        model.save_pretrained(output)
    plot(history, output / "loss.png")
    record = record | {
        "seconds": round(seconds_of(history), 1),
        "processes": world_size(),
        "parameters": model.num_parameters(),
        "bits_per_byte": heldout_bits_per_byte(model, tokenizer, corpus, training) if corpus.heldout else None,
        "versions": versions(),
    }
    write_record(output, record)
    report.write(history)
    return record


def seconds_of(history: Sequence[dict[str, float]]) -> float:
    """Seconds that the logged part of a run took."""
    return history[-1]["seconds"] if history else 0.0


def heldout_windows(training: Training) -> tuple[int, int]:
    """Window and stride in which a model is judged: as long as the sequences it was trained on, a quarter at a time."""
    return training.sequence_length, max(1, training.sequence_length // 4)


def heldout_bits_per_byte(model: PreTrainedModel, tokenizer: Tokenizer, corpus: Corpus, training: Training) -> float:
    """Bits per byte of the held-out text, in `heldout_windows`."""
    return bits_per_byte(model, tokenizer, corpus.heldout, *heldout_windows(training))


def versions() -> dict[str, str]:
    """Versions of what decided the result."""
    return {
        "thrifty": thrifty.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _model(
    corpus: Corpus, recipe: Recipe, given: Given, resumed: Path | None
) -> tuple[ThriftyForCausalLM, Tokenizer, ThriftyForCausalLM | None]:
    """The model to train, its tokenizer, and what it was made of where that was another model.

    A resumed run has the tokenizer it had.
    """
    if given.start is not None and given.tokenizer is not None:
        with quiet():
            original = load_start(given.start, given.begin_token())
        return low_bit_model(original, recipe.training.insert_sub_norms), given.tokenizer, original
    if recipe.shape is None:
        rule = f"[train] a recipe must have a shape for a new model; {recipe.name} has none"
        raise ThriftyError(f"{rule}; give a model to go on from by --from, or choose another (--recipe list)")
    vocab_size, tokenizer = recipe.shape.vocab_size, given.tokenizer
    if tokenizer is None:
        texts = (text for part in corpus.parts for _ in range(part.vocabulary_weight) for text in part.documents)
        tokenizer = Tokenizer.from_str(from_first(lambda: tokenizer_json(texts, vocab_size, resumed)))
    model = new_model(recipe.shape, tokenizer, given.begin_token())
    initialize(model, recipe.training)
    return model, tokenizer, None


def _teacher(given: Given) -> PreTrainedModel | None:
    """The model to learn from, if there is one."""
    if given.teacher is None:
        return None
    with quiet():
        return load_teacher(given.teacher, has_fast_bf16())


def _arguments(training: Training, output: Path, evaluate: bool) -> TrainingArguments:
    sequences = sequences_at_once(training.batch_size, training.accumulate)
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=training.steps,
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=training.accumulate,
        # Sequences that are left over count once only where each is a batch.
        per_device_eval_batch_size=sequences if world_size() == 1 else 1,
        ddp_find_unused_parameters=False,
        max_grad_norm=training.clip,
        logging_steps=max(training.steps // 200, 1),
        eval_strategy="steps" if evaluate else "no",
        eval_steps=training.eval_every,
        save_steps=training.save_every,
        save_total_limit=2,
        prediction_loss_only=True,
        train_sampling_strategy="sequential",
        seed=training.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=has_fast_bf16(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        # What is written here goes to config.json, and a model without its cache generates at a crawl.
        use_cache=True,
    )
    # Where there are several GPUs and no launcher, one is used, and the batch is not multiplied by their number.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def has_fast_bf16() -> bool:
    """Whether products in bfloat16 are faster here than in float32: codes are exact in both."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _in_time(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    training: Training,
    max_minutes: float | None,
    before: dict[str, Any],
) -> Training:
    """The settings with as many of their steps as `max_minutes` allow; a resumed run keeps the number it had."""
    if max_minutes is None:
        return training
    if max_minutes <= 0:
        raise ThriftyError(f"[train] the minutes must be more than 0; got {max_minutes}")
    started = time.perf_counter()
    fitting = before.get("steps")
    if fitting is None:
        step = seconds_per_step(model, training, teacher)
        fitting = int((max_minutes * 60 - (time.perf_counter() - started)) / step)
    return replace(training, steps=max(1, min(training.steps, fitting)))


def seconds_per_step(
    model: PreTrainedModel, training: Training, teacher: PreTrainedModel | None = None, count: int = 3
) -> float:
    """Time of a step on a copy of the model, with the teacher's part: the median of `count` after one to warm up."""
    copy = deepcopy(model)
    optimizer = build_optimizer(copy, training)
    size = (sequences_at_once(training.batch_size, training.accumulate), training.sequence_length)
    tokens = torch.randint(model.config.vocab_size, size, device=model.device)
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        for _ in range(training.accumulate):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bf16()):
                loss = copy(input_ids=tokens, labels=tokens).loss
                if teacher is not None:
                    teacher(input_ids=tokens, use_cache=False)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def can_compile() -> bool:
    """Whether there is the C++ compiler that torch.compile needs for a CPU."""
    return torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def _run(trainer: Trainer, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
        return
    first = int(checkpoint.name.rpartition("-")[2])
    if isinstance(trainer.train_dataset, StreamedBlocks):
        trainer.train_dataset.restore(checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except ThriftyError:
        raise
    except Exception as problem:
        # Loading fails before a step is made; what fails later is not the checkpoint's fault.
        if trainer.state.global_step > first:
            raise
        reason = str(problem).partition("\n")[0]
        rule = f"[train] {checkpoint} cannot be resumed ({type(problem).__name__}: {reason})"
        raise ThriftyError(f"{rule}; delete that folder to go on from the one before, or start by --fresh") from problem


def _greet(console, corpus: Corpus, recipe: Recipe, training: Training, model, output: Path, checkpoint) -> None:
    tokens = training.steps * training.batch_size * training.sequence_length
    size = f"{sum(part.size for part in corpus.parts) / 1e6:.2f} MB"
    held = len(corpus.heldout.encode())
    size = size if corpus.stream is None else "a stream"
    console.print(f"[bold]text[/]    {corpus.name}: {size} to train on, {held:,} bytes held out")
    parameters = f"{model.num_parameters() / 1e6:.2f} M parameters"
    console.print(f"[bold]model[/]   {model.config.model_type}, {parameters}, recipe {recipe.name}")
    console.print(f"[bold]run[/]     {training.steps:,} steps, {tokens / 1e6:.1f} M tokens, into {output}")
    if world_size() > 1:
        sequences = sequences_at_once(training.batch_size, training.accumulate)
        console.print(f"        {world_size()} processes, which compute {sequences} sequences each at once")
    if training.steps < recipe.training.steps:
        console.print(f"        fewer than the {recipe.training.steps:,} steps of the recipe, to end in time")
    if checkpoint is not None:
        console.print(f"[bold]resume[/]  going on from {checkpoint.name} (--fresh starts anew)")
