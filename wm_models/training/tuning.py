"""Tuning a checkpoint on chats (SFT) or on preferences (DPO), by TRL's trainers.

R rows, S tokens of a row.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from wm_models.checkpoint.files import CONFIG, open_checkpoint, read_json
from wm_models.checkpoint.formats import config_class
from wm_models.configuration import DogeConfig
from wm_models.decoder import DecoderForCausalLM
from wm_models.presets import MODELS
from wm_models.shipped import resolve_checkpoint
from wm_models.training.chats import (
    Chat,
    Encoded,
    answer_end,
    check_messages,
    encode_chat,
    pack_chats,
    prompt_ids,
    read_chats,
    read_rows,
    set_template,
)
from wm_models.training.data import Document, check_held_out, is_held_out
from wm_models.training.errors import TrainingError
from wm_models.training.instructions import read_instructions
from wm_models.training.recipe import SFT, Recipe
from wm_models.training.rows import Rows
from wm_models.training.trainer import WholeTrainer, training_arguments

log = logging.getLogger(__name__)


class Pairs:
    """Preferences: a prompt, the better answer and the worse one, as messages."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> int:
        """How many pairs there are to compare."""
        return len(self.rows)

    def digest(self) -> str:
        """A hash of all of them: the same exactly when the data are."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()

    def divisible(self, by: int) -> "Pairs":
        """Pairs in a number divisible by `by`: the last few are left out or, where all are fewer, repeated."""
        count = len(self) // by * by or by
        return Pairs([self.rows[index % len(self)] for index in range(count)])


class Example(NamedTuple):
    """A chat with its tokens; `pair` is the preference whose better answer it ends with, where it is one's."""

    chat: Chat
    encoded: Encoded
    pair: dict[str, Any] | None = None


class Base(NamedTuple):
    """The checkpoint to tune, with the tokenizer that the tuned model gets."""

    model: DecoderForCausalLM  # float32
    tokenizer: PreTrainedTokenizerFast


class Material(NamedTuple):
    """The data of a run: what is trained on and what is measured on, as names and texts and as the trainer takes it."""

    train: list[Document]
    held_out: list[Document]
    train_rows: Rows | Pairs
    held_out_rows: Rows | Pairs
    prompt: list[int]  # of the first chat that is held out
    left_out: int  # chats that are longer than a row
    end: int  # the special token that ends an answer


def load_base(recipe: Recipe) -> Base:
    """The model and the tokenizer that a recipe tunes, with the recipe's new tokens in both.

    A new token's embedding is drawn by torch's generator. Raises `TrainingError`.
    """
    folder = Path(resolve_checkpoint(recipe.base))
    if not folder.is_dir():
        raise TrainingError(f"{recipe.base}: no such directory, and no model that ships; expected the base to tune")
    files = open_checkpoint(str(folder), {})
    kind: type[DecoderForCausalLM] = MODELS[config_class(read_json(files, CONFIG).get("model_type")) or DogeConfig]
    source = Path(recipe.tokenizer) if recipe.tokenizer else folder
    if not (source / "tokenizer.json").exists():
        raise TrainingError(f"{source}: has no tokenizer.json; name a tokenizer's directory with --tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    set_template(tokenizer, recipe.chat_template)
    model = kind.from_pretrained(files, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": list(recipe.new_tokens)})  # type: ignore[dict-item]
    if len(tokenizer) > model.config.vocab_size:
        if not recipe.new_tokens:
            raise TrainingError(
                f"{source}: the tokenizer has {len(tokenizer)} ids, and the model {model.config.vocab_size}; "
                "expected the base's own tokenizer"
            )
        model.resize_token_embeddings(len(tokenizer))
    length = model.config.max_position_embeddings
    if recipe.sequence_length > length:
        raise TrainingError(
            f"sequence_length is {recipe.sequence_length}; {recipe.base} takes at most max_position_embeddings = "
            f"{length}"
        )
    return Base(model, tokenizer)


def prepare_chats(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Material:
    """Read, split, encode and pack a recipe's chats, by default the instructions of the standard library."""
    read = (
        read_chats(recipe.data, recipe.exclude) if recipe.data else read_instructions(recipe.exclude, recipe.skip_bad)
    )
    examples = [Example(chat, encode_chat(chat, tokenizer)) for chat in read]
    short = [example for example in examples if len(example.encoded.ids) <= recipe.sequence_length]
    train, held_out = _split(short, recipe)
    pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def rows(part: list[Example]) -> Rows:
        return pack_chats([example.encoded for example in part], recipe.sequence_length, pad)

    train_rows, held_out_rows = rows(train).divisible(recipe.batch_size), rows(held_out).filled(recipe.batch_size)
    return _material(tokenizer, (train, held_out), (train_rows, held_out_rows), len(examples) - len(short))


def prepare_pairs(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Material:
    """Read, check and split a recipe's preferences: `prompt`, `chosen` and `rejected`, lists of messages, a line."""
    if not recipe.data:
        raise TrainingError("data is missing; expected .jsonl files of prompt, chosen and rejected for dpo")
    short: list[Example] = []
    total = 0
    for name, file, number, row in read_rows(recipe.data, recipe.exclude):
        pair = {
            key: check_messages(row.get(key), f"{file}:{number}: {key}") for key in ("prompt", "chosen", "rejected")
        }
        chosen, rejected = (Chat(name, [*pair["prompt"], *pair[key]]) for key in ("chosen", "rejected"))
        encoded = [encode_chat(chat, tokenizer) for chat in (chosen, rejected)]
        total += 1
        if max(len(each.ids) for each in encoded) <= recipe.sequence_length:
            short.append(Example(chosen, encoded[0], pair))
    parts = _split(short, recipe)
    train, held_out = (Pairs([e.pair for e in part if e.pair]).divisible(recipe.batch_size) for part in parts)
    return _material(tokenizer, parts, (train, held_out), total - len(short))


def _split(examples: Sequence[Example], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out: by the recipe's patterns, or at least the last example."""
    if len(examples) < 2:
        raise TrainingError(
            f"{len(examples)} chats fit rows of {recipe.sequence_length} tokens; expected two or more, one to measure "
            "on"
        )
    chosen = [is_held_out(example.chat.name, recipe.held_out) for example in examples]
    check_held_out(sum(chosen), len(chosen), recipe.held_out)
    if all(chosen) or not any(chosen):
        chosen = [index == len(examples) - 1 for index in range(len(examples))]
    train = [example for example, out in zip(examples, chosen, strict=True) if not out]
    return train, [example for example, out in zip(examples, chosen, strict=True) if out]


def _material(
    tokenizer: PreTrainedTokenizerFast, parts: tuple[list[Example], list[Example]],
    rows: tuple[Rows | Pairs, Rows | Pairs], left_out: int,
) -> Material:  # fmt: skip
    """The examples of both parts as documents, their rows, and what the first one that is held out tells."""
    train, held_out = ([_document(example, tokenizer) for example in part] for part in parts)
    first = parts[1][0]
    end = answer_end(first.encoded, tokenizer, first.chat.name)
    return Material(train, held_out, *rows, prompt_ids(first.chat, tokenizer), left_out, end)


def _document(example: Example, tokenizer: PreTrainedTokenizerFast) -> Document:
    """A chat's name, and the text of its answers."""
    encoded = example.encoded
    answers = [token for token, answer in zip(encoded.ids, encoded.answers, strict=True) if answer]
    return Document(example.chat.name, str(tokenizer.decode(answers, skip_special_tokens=True)))


def end_with(model: DecoderForCausalLM, token: int) -> None:
    """Let `token` end a generated text, besides what ends it already."""
    ends: Any = (model.generation_config or GenerationConfig()).eos_token_id
    known = [ends] if isinstance(ends, int) else list(ends or [])
    model.generation_config.eos_token_id = known if token in known else [*known, token]  # type: ignore[union-attr]


def tuning_arguments(recipe: Recipe, checkpoints: Path, trial: bool) -> TrainingArguments:
    """As `training_arguments`, of TRL's class for the recipe's task."""
    # TRL would compute Mixtral's loss of the router, whose scores have another shape
    own: dict[str, Any] = {"gradient_checkpointing": recipe.gradient_checkpointing, "router_aux_loss_coef": 0.0}
    if recipe.task == SFT:
        own |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "shuffle_dataset": False}
        return training_arguments(recipe, checkpoints, trial, trl.SFTConfig, own)
    # every batch has one shape
    own |= {"beta": recipe.beta, "max_length": recipe.sequence_length, "pad_to_multiple_of": recipe.sequence_length}
    return training_arguments(recipe, checkpoints, trial, trl.DPOConfig, own)


class ChatTrainer(WholeTrainer, trl.SFTTrainer):
    """TRL's trainer of chats, on rows that are encoded and packed already."""

    def __init__(
        self, model: DecoderForCausalLM, arguments: Any, train: Rows, held_out: Rows,
        tokenizer: PreTrainedTokenizerFast, callbacks: list[TrainerCallback],
    ):  # fmt: skip
        super().__init__(model, arguments, _stack, _dataset(train), _dataset(held_out), tokenizer, callbacks=callbacks)
        self.begin()
        self.measure_rows(held_out)


class PreferenceTrainer(WholeTrainer, trl.DPOTrainer):
    """TRL's trainer of preferences, held to the model that it begins with."""

    def __init__(
        self, model: DecoderForCausalLM, reference: DecoderForCausalLM, arguments: Any, train: Pairs, held_out: Pairs,
        tokenizer: PreTrainedTokenizerFast, callbacks: list[TrainerCallback],
    ):  # fmt: skip
        super().__init__(
            model, reference, arguments, None, Dataset.from_list(train.rows), Dataset.from_list(held_out.rows),
            tokenizer, callbacks=callbacks,
        )  # fmt: skip
        self.begin()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """TRL's loss of the pairs."""
        return trl.DPOTrainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)


def tuning_trainer(
    recipe: Recipe, base: Base, material: Material, arguments: TrainingArguments, callbacks: list[TrainerCallback]
) -> ChatTrainer | PreferenceTrainer:
    """The trainer of the recipe's task, for the base's model."""
    train: Any = material.train_rows
    held_out: Any = material.held_out_rows
    end_with(base.model, material.end)
    if recipe.task == SFT:
        return ChatTrainer(base.model, arguments, train, held_out, base.tokenizer, callbacks)
    torch.manual_seed(recipe.seed)  # both draw the same new tokens
    reference = load_base(recipe).model.eval()
    return PreferenceTrainer(base.model, reference, arguments, train, held_out, base.tokenizer, callbacks)


def _dataset(rows: Rows) -> Dataset:
    columns = [rows[row] for row in range(len(rows))]
    return Dataset.from_dict({name: [row[name].tolist() for row in columns] for name in columns[0]})


def _stack(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
