"""lm-evaluation-harness's own client of /v1/completions measures what `wm-run evaluate` does, sample by sample."""

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from test_evaluation.tasks import module_sources, write_tasks

from runtime import load
from runtime.evaluation.harness import EngineLM
from test_serve.conftest import serving
from wm_models import shipped_checkpoint

COUNT = 4


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder, module_sources(), COUNT), TaskManager(include_path=str(folder), include_defaults=False)


def samples(model, tasks, names):
    """Of each task, what the model answered to each document's requests."""
    found = simple_evaluate(
        model, tasks=names, task_manager=tasks[1], bootstrap_iters=0, torch_random_seed=None, batch_size=1
    )
    answered = found.get("samples")
    return {name: [sample["resps"] for sample in answered[name]] for name in names}


def rounded(logprob):
    """The same sum in float32, whose rounding depends on how many tokens a step reads: `evaluate` reads a question in
    one step, the server token by token. 1e-7 of the sum was seen, with AVX2 and with AVX-512."""
    return pytest.approx(float(logprob), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("ends", [False, True], ids=["some tokens end a text", "each token ends a text"])
def test_the_client_measures_what_evaluate_does(artifact, tasks, ends):
    pytest.importorskip("tenacity", reason="lm-eval's client needs lm-eval[api]")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    choice, likelihood, completion = tasks[0]
    names = [choice, likelihood, *([] if ends else [completion])]
    model = EngineLM(load(artifact))
    expected = samples(model, tasks, names)
    engine = load(artifact)
    if ends:  # then the one token that the client asks for is never written
        engine.end_ids = frozenset(range(engine.graph.vocabulary))
    with serving(engine) as served:
        client = LocalCompletionsAPI(
            f"{served.url}/v1/completions",
            tokenizer_backend="huggingface",
            model=served.service.name,
            tokenizer=str(shipped_checkpoint()),
            custom_prefix_token_id=model.prefix_token_id,  # this artifact has no config.json, which names another
            max_length=engine.graph.max_length + 1,  # of which it keeps one for the token that it asks for
        )
        found = samples(client, tasks, names)
    for one, other in zip(expected[choice], found[choice], strict=True):
        for (logprob, greedy), (answered, answered_greedy) in zip(
            (each[0] for each in one), (each[0] for each in other), strict=True
        ):
            assert float(answered) == rounded(logprob)
            assert str(answered_greedy) == str(greedy)
    for one, other in zip(expected[likelihood], found[likelihood], strict=True):
        assert float(other[0][0]) == rounded(one[0][0])
    if not ends:
        assert found[completion] == expected[completion]
