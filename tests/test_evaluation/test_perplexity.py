"""Bits a byte and KL divergence of an artifact on texts: against float64 passes of the eager models, and lm-eval."""

import inspect
import json
import shutil
import sys
import textwrap
from importlib.util import find_spec
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import baseline, ours
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from test_export.conftest import lowered

import export.cli
import runtime.bench
import runtime.cli
from export import OnnxOptions, export_onnx
from export.package.manifest import write_manifest
from export.verification.eager_scorer import EagerScorer
from runtime import RequestError, load
from runtime.artifact.manifest import MANIFEST, parse_manifest
from runtime.evaluation.harness import EngineLM
from runtime.evaluation.perplexity import PerplexityOptions, perplexity
from runtime.evaluation.scorers import PIECE, EngineScorer
from wm_models import DogeForCausalLM, shipped_checkpoint, shipped_tokenizer

LENGTH = 200  # tokens; a context of more than one piece of 128


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "one.py", folder / "two.py"]
    paths[0].write_text(inspect.getsource(textwrap)[:3000] + "# naïve – é\n", encoding="utf-8")
    paths[1].write_text(inspect.getsource(json)[:700], encoding="utf-8")
    return paths


@pytest.fixture(scope="module", params=["last", "all"])
def engine(request, tmp_path_factory):
    """doge-3m, which gives the logits of the last token alone or of all."""
    out = tmp_path_factory.mktemp("artifact") / "doge-3m"
    export_onnx("doge-3m", out, OnnxOptions(logits=request.param, max_batch=2, max_length=LENGTH + 1))
    return load(out)


def token_ids(engine, path):
    return engine.tokenizer.encode(path.read_text(encoding="utf-8")).ids


def float64(model, ids, length, stride, prefix):
    """log-probabilities (N, V), float64, of every position of a text, in lm-eval's windows."""
    rows = []
    for window in get_rolling_token_windows(ids, prefix, length, length - stride + 1):
        context, continuation = make_disjoint_window(window)
        with torch.inference_mode():
            logits = model(torch.tensor([[*context, *continuation][:-1]])).logits[0, len(context) - 1 :]
        rows.append(torch.log_softmax(logits, -1))
    return torch.cat(rows)


@pytest.mark.parametrize("stride", [LENGTH, 70])
def test_bits_per_byte_are_those_of_a_float64_pass(engine, texts, stride):
    model = DogeForCausalLM.from_pretrained(shipped_checkpoint(), dtype=torch.float64).eval()
    nats, count = 0.0, 0
    for path in texts:
        ids = token_ids(engine, path)
        known = float64(model, ids, LENGTH, stride, model.config.bos_token_id)
        nats -= float(known[torch.arange(len(ids)), ids].sum())
        count += len(ids)
    size = sum(path.stat().st_size for path in texts)
    found = perplexity(engine, PerplexityOptions(texts, stride=stride)).figures
    assert (found["tokens"], found["bytes"], found["length"], found["stride"]) == (count, size, LENGTH, stride)
    assert found["bits_per_byte"] == pytest.approx(nats / log(2) / size, abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)


def test_bits_per_byte_are_those_of_lm_eval(engine, texts):
    found = perplexity(engine, PerplexityOptions(texts[:1])).figures
    request = SimpleNamespace(args=(texts[0].read_text(encoding="utf-8"),))
    (logprob,) = EngineLM(engine).loglikelihood_rolling([request], disable_tqdm=True)
    assert found["bits_per_byte"] == pytest.approx(-logprob / log(2) / texts[0].stat().st_size, abs=1e-6)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two small models that differ: the artifact of one and the checkpoint of the other, and both in float64."""
    root = tmp_path_factory.mktemp("two")
    models = []
    for name, scale in (("one", 1.0), ("two", 0.7)):
        model = ours(baseline(vocab_size=32768, bos_token_id=0, eos_token_id=1), expert_routing="token")
        model.model.norm.weight.data *= scale
        model.save_pretrained(root / name)
        shipped_tokenizer().save_pretrained(root / name)
        models.append(DogeForCausalLM.from_pretrained(root / name, dtype=torch.float64).eval())
        lowered(root / f"{name}-artifact", model, max_length=120)
        for text in ("config.json", "tokenizer.json"):
            (root / f"{name}-artifact" / text).write_bytes((root / name / text).read_bytes())
        manifest = parse_manifest((root / f"{name}-artifact" / MANIFEST).read_bytes(), root / MANIFEST)
        write_manifest(root / f"{name}-artifact", manifest, verified=True)
    return root, models


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_the_divergence_is_that_of_float64_passes(two, texts, kind):
    root, models = two
    engine = load(root / "one-artifact")
    other = EngineScorer(load(root / "two-artifact")) if kind == "artifact" else EagerScorer(str(root / "two"))
    found = perplexity(engine, PerplexityOptions(texts[1:], length=100, stride=60, worst=3), other)
    ids = token_ids(engine, texts[1])
    graph, reference = (float64(model, ids, 100, 60, 0) for model in models)
    kl = torch.nn.functional.kl_div(graph, reference, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(found.divergences, kl.numpy(), rtol=1e-3, atol=1e-6)
    compared = found.figures["against"]
    assert compared["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert compared["max_kl"] == pytest.approx(float(kl.max()), rel=1e-4)
    assert compared["kl_99th_percentile"] == pytest.approx(float(torch.quantile(kl, 0.99)), rel=1e-4)
    agreement = float((graph.argmax(-1) == reference.argmax(-1)).double().mean())
    assert compared["argmax_agreement"] == pytest.approx(agreement, abs=1.5 / len(ids))
    assert [each["position"] for each in compared["worst"]] == kl.argsort(descending=True)[:3].tolist()
    for each in compared["worst"]:
        assert each["token"] == engine.decode_ids([ids[each["position"]]])
        assert each["argmax"]["token"] == engine.decode_ids([int(graph[each["position"]].argmax())])
        probability = float(reference[each["position"]].max().exp())
        assert each["other_argmax"]["probability"] == pytest.approx(probability, rel=1e-3)
    nats = -float(reference[torch.arange(len(ids)), ids].sum())
    assert compared["bits_per_byte"] == pytest.approx(nats / log(2) / texts[1].stat().st_size, rel=1e-5)


def test_another_call_meanwhile_is_noticed(engine):
    rows = EngineScorer(engine).rows(np.zeros(LENGTH, np.int64), 0)
    assert len(next(rows)) == PIECE
    engine.prefill([[1, 2, 3]])
    with pytest.raises(RequestError, match="another call"):
        next(rows)
    engine.reset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": []}, "--text"),
        ({"stride": 0}, "--stride is 0"),
        ({"length": 0}, "--length is 0"),
        ({"worst": -1}, "--worst is -1"),
        ({"length": 500}, "--length is 500; expected 1 to 119"),
        ({"length": 50, "stride": 51}, "--stride is 51; expected 1 to 50"),
        ({"plot": "kl.png"}, "expected --against"),
    ],
)
def test_what_fits_nothing_is_refused(two, texts, options, words):
    with pytest.raises(RequestError, match=words):
        perplexity(load(two[0] / "one-artifact"), PerplexityOptions(**{"text": texts, **options}))


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty"), (b"abc\xff", "byte 3 is no UTF-8")])
def test_what_is_no_text_is_refused(two, tmp_path, data, words):
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(RequestError, match=words):
        perplexity(load(two[0] / "one-artifact"), PerplexityOptions([tmp_path / "text"]))


def test_models_over_other_tokens_are_refused(two, texts):
    with pytest.raises(RequestError, match="over one tokenizer"):
        perplexity(load(two[0] / "one-artifact"), PerplexityOptions(texts), EagerScorer("doge-3m"))


@pytest.mark.parametrize("kind", [EagerScorer, lambda path: EngineScorer(load(path))], ids=["checkpoint", "artifact"])
def test_models_over_as_many_other_tokens_are_refused(two, texts, tmp_path, kind):
    """Two tokens have changed places."""
    where = tmp_path / "other"
    shutil.copytree(two[0] / ("two" if kind is EagerScorer else "two-artifact"), where)
    (where / "tokenizer.json").write_text(swapped_tokens((where / "tokenizer.json").read_text()))
    if kind is not EagerScorer:
        write_manifest(where, parse_manifest((where / MANIFEST).read_bytes(), where / MANIFEST), verified=True)
    with pytest.raises(RequestError, match=r"other: the token '.*' has id \d+; expected \d+"):
        perplexity(load(two[0] / "one-artifact"), PerplexityOptions(texts), kind(str(where)))


def swapped_tokens(text):
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return json.dumps(tokenizer)


def run(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_the_commands(two, texts, tmp_path, monkeypatch, capsys):
    root, picture = two[0], tmp_path / "kl.png"
    common = ("perplexity", root / "one-artifact", "--text", texts[1])
    code, out, _ = run(monkeypatch, capsys, runtime.cli.main, *common, "--json")
    assert code == 0
    alone = json.loads(out)
    assert "against" not in alone
    against = ("--against", root / "two-artifact", "--plot", picture)
    code, out, _ = run(monkeypatch, capsys, runtime.cli.main, *common, *against, "--json")
    assert code == 0
    beside = json.loads(out)
    assert beside["bits_per_byte"] == alone["bits_per_byte"]
    assert len(beside["against"]["worst"]) == 10
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(monkeypatch, capsys, export.cli.main, *common, "--against", root / "two")
    assert code == 0
    assert "argmax agreement" in out
    assert "Where the two differ most" in out


def test_each_command_names_the_one_that_compares_with_the_other_kind(two, texts, monkeypatch, capsys):
    common = ("perplexity", two[0] / "one-artifact", "--text", texts[1], "--against")
    code, _, said = run(monkeypatch, capsys, runtime.cli.main, *common, two[0] / "two")
    assert (code, said.count("\n")) == (2, 1)
    assert "wm-export perplexity" in said
    code, _, said = run(monkeypatch, capsys, export.cli.main, *common, two[0] / "two-artifact")
    assert (code, said.count("\n")) == (2, 1)
    assert "wm-run perplexity" in said


def test_a_picture_without_matplotlib_names_the_extra(two, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime.bench, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    arguments = ("--text", texts[1], "--against", two[0] / "two-artifact", "--plot", tmp_path / "kl.png")
    code, _, said = run(monkeypatch, capsys, runtime.cli.main, "perplexity", two[0] / "one-artifact", *arguments)
    assert (code, said.count("\n")) == (2, 1)
    assert "wm-models[export]" in said
