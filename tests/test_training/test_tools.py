"""The tools that people tune models with: PEFT's adapters, and TRL's trainers."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, randomise
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from wm_models import DogeConfig, DogeForCausalLM, shipped_tokenizer

EXPERTS = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "dt_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def build(directory, **changes):
    model = DogeForCausalLM(DogeConfig(**{**SMALL, **changes}))
    randomise(model)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("changes", [{}, {"keep_window_size": 16}, EXPERTS], ids=["dense", "window", "experts"])
def test_an_adapter_learns_is_merged_and_loads_again(changes, tokens, tmp_path):
    """On attention, MLP and experts; beyond the keep window too, whose biases come from an adapted projection."""
    model = build(tmp_path / "base", **changes)
    targets = [*LINEAR, "router_gate", "down_embed", "up_embed"] if changes is EXPERTS else LINEAR
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([each for each in adapted.parameters() if each.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        losses.append(adapted(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted.save_pretrained(tmp_path / "adapter")
        expected = adapted.double().eval()(input_ids=tokens).logits
        base = DogeForCausalLM.from_pretrained(tmp_path / "base")
        merged = PeftModel.from_pretrained(base, tmp_path / "adapter").double().merge_and_unload()
        assert type(merged) is DogeForCausalLM
        assert (merged(tokens).logits - expected).abs().max() <= 1e-9


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = shipped_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(index, answer="x = {}"):
    return {"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": answer.format(index)}


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def arguments(kind, directory, **changes):
    return kind(
        output_dir=str(directory), max_steps=3, per_device_train_batch_size=4, max_length=64, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", seed=0, **changes,
    )  # fmt: skip


def tune(directory, tokenizer, changes, chats=32, **options):
    """The losses of TRL's supervised tuning on chats."""
    build(directory, vocab_size=len(tokenizer), **changes)
    trainer = SFTTrainer(
        DogeForCausalLM.from_pretrained(directory), args=arguments(SFTConfig, directory / "out", **options),
        train_dataset=Dataset.from_list([{"messages": list(chat(index))} for index in range(chats)]),
        processing_class=tokenizer,
    )  # fmt: skip
    return losses(trainer)


def test_chats_that_are_packed_see_themselves_alone(chat_tokenizer, tmp_path):
    """All of a batch in one row have the loss that they have in rows of their own."""
    alone = tune(tmp_path / "alone", chat_tokenizer, {}, chats=4)
    packed = tune(tmp_path / "packed", chat_tokenizer, {}, chats=4, packing=True)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_compiled_as_eager(chat_tokenizer, tmp_path):
    eager = tune(tmp_path / "eager", chat_tokenizer, {}, packing=True)
    compiled = tune(tmp_path / "compiled", chat_tokenizer, {}, packing=True, torch_compile=True)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_experts_are_tuned_without_trls_loss_of_their_router(chat_tokenizer, tmp_path):
    """TRL computes Mixtral's, whose scores have another shape."""
    found = tune(tmp_path / "model", chat_tokenizer, EXPERTS, router_aux_loss_coef=0.0, gradient_checkpointing=True)
    assert all(torch.isfinite(torch.tensor(found)))


def prefer(directory, tokenizer, layers=SMALL["num_hidden_layers"], **options):
    """The losses of TRL's tuning on preferences."""
    build(directory / "model", vocab_size=len(tokenizer), num_hidden_layers=layers)
    pairs = []
    for index in range(32):
        question, good = chat(index)
        pairs.append({"prompt": [question], "chosen": [good], "rejected": [chat(index, "no {}")[1]]})
    policy, reference = (DogeForCausalLM.from_pretrained(directory / "model") for _ in range(2))
    trainer = DPOTrainer(
        policy, reference, args=arguments(DPOConfig, directory / "out", learning_rate=1e-3, **options),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    )  # fmt: skip
    return losses(trainer)


def test_preferences(chat_tokenizer, tmp_path):
    """DPO begins at log 2, for policy and reference are one model, and falls."""
    found = prefer(tmp_path, chat_tokenizer)
    assert found[0] == pytest.approx(0.6931, abs=1e-3)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_compiled_preferences_as_eager(chat_tokenizer, tmp_path):
    """DPO under `torch_compile`, every batch padded to one shape."""
    eager = prefer(tmp_path / "eager", chat_tokenizer, layers=1)
    compiled = prefer(tmp_path / "compiled", chat_tokenizer, layers=1, torch_compile=True, pad_to_multiple_of=64)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_a_dense_config_has_no_loss_of_a_router(tmp_path):
    """TRL takes any number but zero for the sign of one; experts that join the model have transformers' default."""
    build(tmp_path / "model")
    assert DogeForCausalLM.from_pretrained(tmp_path / "model").config.router_aux_loss_coef == 0
    assert DogeForCausalLM.from_pretrained(tmp_path / "model", **EXPERTS).config.router_aux_loss_coef == 0.001


ACCELERATED = """
import sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from wm_models import DogeForCausalLM

accelerator = Accelerator(cpu=True)
model = DogeForCausalLM.from_pretrained(sys.argv[1])
ids = torch.randint(5, 200, (32, 24), generator=torch.Generator().manual_seed(0))
loader = DataLoader(ids, batch_size=int(sys.argv[3]))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for rows in loader:
    loss = model(input_ids=rows, labels=rows).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
if accelerator.is_main_process:
    with open(sys.argv[2], "w") as file:
        file.write(f"{accelerator.num_processes} " + " ".join(map(repr, losses)))
"""


def test_accelerate_launch(tmp_path):
    """Two processes with four rows each have the curve of one with eight."""
    build(tmp_path / "model")
    script = tmp_path / "program.py"
    script.write_text(ACCELERATED)
    found = []
    for processes, rows in ((1, 8), (2, 4)):
        out = tmp_path / f"{processes}.txt"
        # torchrun is what it starts for "--multi_gpu" alone; the program then asks for CPUs
        kind = "--multi_gpu" if processes > 1 else "--cpu"
        launch = [sys.executable, "-m", "accelerate.commands.launch", kind, "--num_machines", "1"]
        options = ["--num_processes", str(processes), "--main_process_port", "0", "--mixed_precision", "no"]
        program = [str(script), str(tmp_path / "model"), str(out), str(rows)]
        done = subprocess.run(
            [*launch, *options, "--dynamo_backend", "no", *program],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        count, *losses = out.read_text().split()
        assert int(count) == processes
        found.append([float(loss) for loss in losses])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)
