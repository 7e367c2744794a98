"""The engine behind lm-evaluation-harness gives what lm-eval's own model of transformers gives of the eager model."""

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from export import OnnxOptions, export_onnx
from runtime import RequestError, load
from runtime.evaluation.harness import EngineLM
from test_evaluation.tasks import module_sources, write_tasks
from wm_models import DogeForCausalLM, shipped_checkpoint

COUNT = 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder, module_sources(), COUNT), TaskManager(include_path=str(folder), include_defaults=False)


def answers(model, tasks):
    """Of each task, what the model answered to each document's requests."""
    names, manager = tasks
    found = simple_evaluate(
        model, tasks=list(names), task_manager=manager, bootstrap_iters=0, torch_random_seed=None, batch_size=1
    )
    assert found is not None
    samples, results = found.get("samples"), found.get("results")
    assert samples is not None
    return {name: [sample["resps"] for sample in samples[name]] for name in names}, results


@pytest.fixture(scope="module")
def expected(tasks):
    model = DogeForCausalLM.from_pretrained(shipped_checkpoint(), dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    length = model.config.max_position_embeddings - 1
    return answers(HFLM(model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=length), tasks)


@pytest.mark.parametrize("logits", ["all", "last"])
def test_float32_equals_the_eager_model(tasks, expected, tmp_path, logits):
    export_onnx("doge-3m", tmp_path / "artifact", OnnxOptions(logits=logits, max_batch=4))
    with_engine, results = answers(EngineLM(load(tmp_path / "artifact")), tasks)
    choice, likelihood, completion = tasks[0]
    for one, other in zip(expected[0][choice], with_engine[choice], strict=True):
        for (logprob, greedy), (found, found_greedy) in zip((x[0] for x in one), (x[0] for x in other), strict=True):
            assert abs(float(logprob) - float(found)) < 1e-3
            assert str(greedy) == str(found_greedy)
    for one, other in zip(expected[0][likelihood], with_engine[likelihood], strict=True):
        assert abs(float(one[0][0]) - float(other[0][0])) < 1e-3
    assert expected[0][completion] == with_engine[completion]
    assert {name: results[name].get("acc,none") for name in tasks[0]} == {
        name: expected[1][name].get("acc,none") for name in tasks[0]
    }


def test_what_it_cannot_do_is_refused(tasks, tmp_path):
    export_onnx(shipped_checkpoint(), tmp_path / "artifact", OnnxOptions(max_length=64, max_batch=1))
    with pytest.raises(RequestError, match="max-length"):
        EngineLM(load(tmp_path / "artifact"))._loglikelihood_tokens([(None, [1], [2] * 64)])
