"""Tuning a model that is there, on TRL's trainers: on answers (SFT), or on preferences (DPO), whole or by adapters."""

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed
from trl.data_utils import pack_dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from thrifty.checkpoint.config import read_json
from thrifty.checkpoint.hub import resolve
from thrifty.errors import ThriftyError
from thrifty.models import round_dense_parameters
from thrifty.nn import BitLinear, is_packed, pack
from thrifty.train import trainer as runs
from thrifty.train.checkpoints import CHECKPOINTS, checkpoint_to_resume, clear_run, write_record
from thrifty.train.conversations import PackedRows, give_template, read_rows, record_of, split_rows, supervised
from thrifty.train.curve import plot
from thrifty.train.event_files import event_files
from thrifty.train.initial import read_model
from thrifty.train.progress import ProgressBar
from thrifty.train.recipe import Recipe, Tuning
from thrifty.train.report import Report

#: What transformers calls the recomputation of activations; the older name is warned of where there is the newer.
RECOMPUTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@dataclass(frozen=True)
class TuningResult:
    """What a run leaves behind."""

    #: The tuned model, or a peft model where adapters were trained.
    model: Any
    tokenizer: PreTrainedTokenizerBase
    #: The trainer's log: dicts with `step`, and what TRL measures.
    history: list[dict[str, float]]
    #: What `training.json` holds.
    record: dict[str, Any]


def tune(
    start: str | Path,
    data: Sequence[str | Path],
    recipe: Recipe,
    output: Path,
    *,
    heldout: float = 0.05,
    resume: bool | None = None,
    console: Console | None = None,
) -> TuningResult:
    """Tune the model `start` (a folder, or an id on the hub) on rows of `data` and leave it in `output`.

    Method sft minimises -log p(answer | prompt) over the tokens of answers; dpo minimises -log sigmoid(beta (d_w -
    d_l)), d = log p(answer | prompt) - log p_start(answer | prompt), w the chosen and l the rejected answer (arXiv
    2305.18290). Columns: `thrifty.train.conversations.COLUMNS`. The last rows, a share of `heldout`, are judged by.

    Latent weights are trained; packed ones are unpacked for it. With `lora_rank` the model stays, or gets, packed, and
    adapters beside its layers are trained. `output` gets the model with its latent weights, or the adapter in peft's
    files, which `thrifty pack` merges; the tokenizer; `training.json`, `loss.png`, `logs/`, resumable `checkpoints/`.

    Raises ThriftyError, before the folder is touched, where data lacks the columns of the method or rows, where
    conversations have no chat template, the tokenizer has more pieces than the model, sequences are longer than the
    positions, and where the folder holds another run.
    """
    console = console or Console(stderr=True)
    tuning: Tuning = recipe.training
    folder = resolve(start)
    if folder.resolve() == output.resolve():
        raise ThriftyError(f"[train] the tuned model needs a folder of its own; got {output} for both; give --output")
    tokenizer = _tokenizer(folder, tuning)
    with _quiet():
        rows = read_rows(data, recipe.method)
        settings = {
            "recipe": asdict(recipe),
            "start": str(start),
            "data": record_of(data, rows),
            "heldout": heldout,
        }
        checkpoint = checkpoint_to_resume(output, settings, resume)
        give_template(tokenizer, rows)
        # peft writes the name down as that of the adapter's base.
        name = str(folder.resolve()) if Path(start).expanduser().exists() else str(start)
        model = _model(folder, name, tuning)
        train_rows, heldout_rows = split_rows(rows, heldout)
        adapter = _adapter(model, tuning)
        prepared = [_prepared(recipe, part, tokenizer) for part in (train_rows, heldout_rows) if part]
    _greet(console, recipe, model, prepared, output, checkpoint)
    if checkpoint is None:
        clear_run(output, fresh=resume is False)
    write_record(output, {"settings": settings, "finished": False})
    report = Report(output, console)
    set_seed(tuning.seed)
    started = time.perf_counter()
    with _quiet(), event_files(output / "logs") as events, TuningBar(console) as bar, _no_router_loss(model):
        trainer = _trainer(
            recipe,
            prepared,
            _arguments(recipe, output, len(prepared) > 1, checkpoint is None, len(prepared[0][0])),
            model=model,
            peft_config=adapter,
            processing_class=tokenizer,
            tokenizer=tokenizer,
            since=started,
            callbacks=[bar, events, report],
        )
        runs._run(trainer, checkpoint)
        _settle(trainer)
        scores = _scores(trainer) if len(prepared) > 1 else {}
        tuned = _released(trainer)
    with _quiet():
        tuned.save_pretrained(output)
        tokenizer.save_pretrained(output)
    history = trainer.state.log_history
    plot(history, output / "loss.png")
    record = {
        "settings": settings,
        "finished": True,
        "steps": trainer.state.global_step,
        "seconds": round(runs.seconds_of(history), 1),
        "parameters": {"all": _count(tuned.parameters()), "trained": _count(_trained(tuned))},
        "heldout": scores,
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "versions": {**runs.versions(), "trl": trl.__version__},
    }
    write_record(output, record)
    report.write(history)
    return TuningResult(tuned, tokenizer, history, record)


class _Run(runs.CausalTrainer):
    """A trainer of TRL with the records of a run, AdamW, and no messages home."""

    def create_optimizer(self, model=None):
        return Trainer.create_optimizer(self)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return Trainer.create_scheduler(self, num_training_steps, optimizer)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None is left among the checkpoints."""

    def _send_telemetry(self) -> None:
        """TRL's would tell what is trained."""


class Supervised(_Run, SFTTrainer):
    """TRL's trainer of answers."""


class Preferring(_Run, DPOTrainer):
    """TRL's trainer of preferences."""


class TuningBar(ProgressBar):
    """The bar, with a line for each look at held-out rows."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, 1.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        super().on_log(args, state, control, logs={k: v for k, v in logs.items() if k != "eval_loss"}, **kwargs)
        if "eval_loss" in logs:
            margin = logs.get("eval_rewards/margins")
            more = "" if margin is None else f", margin {margin:.3f}"
            self.bar.console.print(f"  step {state.global_step:>6}  held-out rows: loss {logs['eval_loss']:.3f}{more}")


def _tokenizer(folder: Path, tuning: Tuning) -> PreTrainedTokenizerBase:
    config = read_json(folder / "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:200]
        rule = f"[train] a model that is tuned must have its tokenizer beside it; {folder} has none that can be read"
        raise ThriftyError(f"{rule} ({reason}); copy its tokenizer files there") from problem
    if len(tokenizer) > config["vocab_size"]:
        rule = f"[train] the tokenizer must have at most the {config['vocab_size']} pieces of the model"
        raise ThriftyError(f"{rule}; got {len(tokenizer)} in {folder}; take the tokenizer that it was trained with")
    positions = config["max_position_embeddings"]
    if tuning.sequence_length > positions:
        rule = f"[train] sequence_length must be at most the {positions} positions of the model"
        raise ThriftyError(f"{rule}; got {tuning.sequence_length}; choose a shorter one")
    if tokenizer.eos_token is None:
        raise ThriftyError(
            f"[train] the tokenizer must have an end token, for the ends of answers; that of {folder} has none; "
            "set eos_token in tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _model(folder: Path, name: str, tuning: Tuning) -> Any:
    model = read_model(folder, unpack=not tuning.lora_rank, dtype=torch.float32)
    model.name_or_path = name
    if not tuning.lora_rank:
        return model
    return pack(model) if any(isinstance(module, BitLinear) for module in model.modules()) else model


def _adapter(model: Any, tuning: Tuning) -> Any:
    """The configuration of the adapters that are trained; None where the weights are."""
    if not tuning.lora_rank:
        return None
    from thrifty.nn.lora import adapter_config

    targets = [] if tuning.lora_targets == "all" else [name.strip() for name in tuning.lora_targets.split(",")]
    return adapter_config(model, tuning.lora_rank, tuning.lora_alpha, targets, tuning.lora_dropout)


def _prepared(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, int]:
    """Rows as the trainer takes them, and how many of them were cut."""
    tuning: Tuning = recipe.training
    if recipe.method == "dpo":
        if tuning.packing:
            raise ThriftyError("[train] packing is for sft; got it for dpo, which compares rows; set packing=false")
        return rows, 0
    told, cut = supervised(rows, tokenizer, tuning.sequence_length)
    if tuning.packing:
        told = pack_dataset(told, tuning.sequence_length, "bfd")
    return told, cut


def _arguments(recipe: Recipe, output: Path, evaluate: bool, fresh: bool, rows: int) -> dict[str, Any]:
    tuning: Tuning = recipe.training
    steps = tuning.steps or int(tuning.epochs * -(-rows // tuning.batch_size))
    # Rows of answers are cut already.
    own = (
        {"beta": tuning.beta, "max_length": tuning.sequence_length} if recipe.method == "dpo" else {"max_length": None}
    )
    return {
        "output_dir": str(output / CHECKPOINTS),
        "max_steps": tuning.steps or -1,
        "num_train_epochs": tuning.epochs,
        "per_device_train_batch_size": tuning.batch_size,
        "per_device_eval_batch_size": tuning.batch_size,
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": tuning.warmup,
        "weight_decay": tuning.weight_decay,
        "max_grad_norm": tuning.clip,
        RECOMPUTING: tuning.gradient_checkpointing,
        "logging_steps": max(steps // 200, 1),
        "eval_strategy": "steps" if evaluate else "no",
        "eval_on_start": evaluate and fresh,
        "eval_steps": tuning.eval_every,
        "save_steps": tuning.save_every,
        "save_total_limit": 2,
        "seed": tuning.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": runs.has_fast_bf16(),
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cache": True,
        "router_aux_loss_coef": 0.0,
        **own,
    }


def _trainer(recipe: Recipe, prepared: list[tuple[Dataset, int]], arguments: dict[str, Any], **options: Any) -> Any:
    tuning: Tuning = recipe.training
    options["training"] = tuning
    options["train_dataset"] = prepared[0][0]
    options["eval_dataset"] = prepared[1][0] if len(prepared) > 1 else None
    if recipe.method == "sft":
        collator = PackedRows(options["processing_class"].pad_token_id) if tuning.packing else None
        trainer: Any = Supervised(args=SFTConfig(**arguments), data_collator=collator, **options)
    else:
        # The adapter can be left out of the model, which is the reference then.
        reference = None if tuning.lora_rank else copy.deepcopy(options["model"]).requires_grad_(False)
        trainer = Preferring(args=DPOConfig(**arguments), ref_model=reference, **options)
    trainer.remove_callback(PrinterCallback)
    if tuning.lora_rank and tuning.lora_requantized:
        from thrifty.nn.lora import requantize

        requantize(trainer.model)
    return trainer


def _settle(trainer: Any) -> None:
    """Give the trained model the values that it is saved with."""
    if not _has_adapters(trainer.model):
        round_dense_parameters(trainer.model)


def _scores(trainer: Any) -> dict[str, float]:
    """What the held-out rows say in the end."""
    kept = ("loss", "mean_token_accuracy", "rewards/margins", "rewards/accuracies")
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in kept if f"eval_{name}" in found}


def _released(trainer: Any) -> Any:
    """The model without what trainers put into it: it computes as the saved one does."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    inner = model.get_base_model() if _has_adapters(model) else model
    # TRL's forward, which never makes the logits.
    inner.__dict__.pop("forward", None)
    return model


def _has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


@contextmanager
def _no_router_loss(model: Any) -> Iterator[None]:
    """TRL computes the load-balance loss of other routers than those of product keys."""
    kept = {name: getattr(model.config, name) for name in ("output_router_logits", "router_aux_loss_coef")}
    model.config.output_router_logits = False
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """`thrifty.train.trainer.quiet`, without bars of data sets and what TRL and peft will change one day."""
    drawn = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with runs.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if drawn:
            datasets.enable_progress_bars()


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _greet(console: Console, recipe: Recipe, model: Any, prepared: list, output: Path, checkpoint: Path | None) -> None:
    tuning: Tuning = recipe.training
    rows = [len(part) for part, _ in prepared]
    cut = sum(count for _, count in prepared)
    console.print(f"[bold]rows[/]    {rows[0]:,} to learn from, {rows[1] if len(rows) > 1 else 0:,} held out")
    if cut:
        console.print(f"        {cut:,} are longer than {tuning.sequence_length} tokens and are cut")
    what = f"adapters of rank {tuning.lora_rank} beside " if tuning.lora_rank else ""
    held = "packed layers" if is_packed(model) else "the weights"
    console.print(f"[bold]model[/]   {model.config.model_type}: training {what}{held}")
    console.print(f"[bold]run[/]     {recipe.method} by the recipe {recipe.name}, into {output}")
    if checkpoint is not None:
        console.print(f"[bold]resume[/]  going on from {checkpoint.name} (--fresh starts anew)")
