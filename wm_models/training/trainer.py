"""transformers' Trainer, held to what a compiled run needs: one graph, shapes that never change, whole checkpoints."""

import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from runtime.host.disk import settle, sync
from wm_models.training.errors import TrainingError
from wm_models.training.recipe import Recipe
from wm_models.training.rows import Rows

log = logging.getLogger(__name__)

STAGING = ".unfinished"
KEPT_CHECKPOINTS = 2


def device_precision() -> str:
    """bf16 where the device computes in bfloat16, else fp32: emulated bfloat16 is many times slower than float32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def training_arguments(
    recipe: Recipe,
    checkpoints: Path,
    trial: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    own: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """The recipe in transformers' terms, for this process's share.

    A `trial` takes two steps, each of one part of the recipe's, and keeps nothing. `kind` is the trainer's class of
    arguments, and `own` are those that only this class has.
    """
    gpu, distributed = torch.cuda.is_available(), torch.distributed.is_torchelastic_launched()
    arguments = kind(
        **(own or {}),
        output_dir=str(checkpoints),
        max_steps=2 if trial else recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(recipe.decay * recipe.steps), "decay_type": "1-sqrt"},
        warmup_steps=round(recipe.warmup * recipe.steps),
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        activation_checkpointing=recipe.gradient_checkpointing,
        bf16=recipe.precision == "bf16",
        torch_compile=recipe.compile,
        fsdp=recipe.sharded,  # type: ignore[arg-type]
        fsdp_config={"version": 2} if recipe.sharded else None,
        ddp_backend="gloo" if distributed and not gpu else None,
        ddp_find_unused_parameters=False,
        use_cpu=not gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        # the graph of the evaluation is compiled before the first step, not in the middle of the run
        eval_on_start=not trial,
        eval_strategy="no" if trial else "steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="no" if trial else "steps",
        save_steps=recipe.save_every,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    rows = min(recipe.device_batch_size, max(recipe.batch_size // arguments.world_size, 1))
    if recipe.batch_size % (rows * arguments.world_size):
        raise TrainingError(
            f"batch_size is {recipe.batch_size}; expected a multiple of {rows * arguments.world_size}: "
            f"{arguments.world_size} processes, each with device_batch_size {rows}"
        )
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = rows
    arguments.gradient_accumulation_steps = 1 if trial else parts_of_step(recipe, arguments)
    return arguments


def parts_of_step(recipe: Recipe, arguments: TrainingArguments) -> int:
    """In how many parts every device computes its rows of a step."""
    return recipe.batch_size // (arguments.per_device_train_batch_size * arguments.world_size)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a run's folder of them, if there is one."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def sweep(folder: Path) -> None:
    """Remove checkpoints before the last two, and what was not finished."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    rotate_checkpoints(output_dir=str(folder), save_total_limit=KEPT_CHECKPOINTS)


class Conclusion(TrainerCallback):
    """Logs and measures after the last step, whatever the intervals are, so that the last checkpoint says all."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_log |= last
        control.should_evaluate |= last and args.do_eval


class WholeTrainer(Trainer):
    """What every run needs of its trainer: one way to measure, and checkpoints that are whole or not there."""

    predictions_in_batch: torch.Tensor  # of the held-out rows
    saving = False

    def begin(self) -> None:
        """Print nothing, and measure after the last step too."""
        self.remove_callback(PrinterCallback)
        self.add_callback(Conclusion)

    def measure_rows(self, held_out_rows: Rows) -> None:
        """Make the mean of a batch's loss the mean over its predictions."""
        # the same for every batch, so that the mean over batches is the mean over predictions
        mean = held_out_rows.targets / len(held_out_rows) * self.args.per_device_eval_batch_size
        self.predictions_in_batch = torch.tensor(mean, device=self.args.device)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL would leave one beside each checkpoint."""

    def create_accelerator_and_postprocess(self) -> None:
        """Shard over CPUs too: accelerate offers FSDP2 on accelerators alone, though its steps run on any device."""
        super().create_accelerator_and_postprocess()
        state, options = self.accelerator.state, cast(Any, self.args.fsdp_plugin_args)
        if options is not None and state.distributed_type == DistributedType.MULTI_CPU:
            plugin = FullyShardedDataParallelPlugin(**options)
            if self.args.bf16:
                plugin.set_mixed_precision("bf16")
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss by the compiled model, where transformers evaluates with the one underneath."""
        inputs, compiled = self._prepare_inputs(inputs), cast(PreTrainedModel, self.model_wrapped)
        with torch.no_grad():
            out = compiled(**inputs, num_items_in_batch=self.predictions_in_batch, skip_logits=True)
        return out.loss, None, None

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        """What a resumed run measures before its first step is no point of the curve: that only compiles."""
        history = list(self.state.log_history)
        metrics = super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)
        if skip_scheduler and self.state.global_step > 0:
            self.state.log_history = history
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Stop before anything made of a loss that is not finite is saved."""
        for name, value in (("loss", tr_loss), ("gradient norm", grad_norm)):
            if value is not None and not math.isfinite(float(value)):
                last = last_checkpoint(Path(self.args.output_dir or ""))
                raise TrainingError(
                    f"step {self.state.global_step}: the {name} is {float(value)} at learning rate "
                    f"{kwargs['learning_rate']:.3g}; lower the learning rate. The last good checkpoint is {last}"
                )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(self.args.output_dir or "")
        return str(folder / STAGING if self.saving else folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name, and give it its own once every process has written its part."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder, began = Path(self.args.output_dir or ""), time.monotonic()
        self.saving = True
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # what writes weights, tokenizer and optimizer raises kinds of its own
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            last = last_checkpoint(folder)
            log.warning("%s could not be written: %s", folder / name, error)
            raise TrainingError(
                f"{folder / name}: cannot be written: {error}. The last good checkpoint is {last}"
            ) from error
        finally:
            self.saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            settle(folder / STAGING / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / STAGING / name).rename(folder / name)
            sync(folder)
            sweep(folder)
            log.info("%s written in %.1f s", folder / name, time.monotonic() - began)
        self.accelerator.wait_for_everyone()


class RowTrainer(WholeTrainer):
    """Trains on `Rows`, a number of them that the batch divides, and measures on others, likewise."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        train_rows: Rows,
        held_out_rows: Rows,
        tokenizer: PreTrainedTokenizerFast,
        callbacks: list[TrainerCallback],
    ):
        super().__init__(
            model,
            arguments,
            train_dataset=train_rows,  # type: ignore[arg-type]
            eval_dataset=held_out_rows,  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.begin()
        self.measure_rows(held_out_rows)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        built["dynamo_plugin"].fullgraph = self.args.world_size == 1
        return built
