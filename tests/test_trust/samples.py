"""Small artifacts and checkpoints to attack, and how to make a changed one consistent again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import baseline, ours

from export import OnnxOptions, export_onnx

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": None,
}


def make_checkpoint(directory: Path, fresh: bool = False, **changes: object) -> Path:
    """A randomised checkpoint, or a `fresh` one as training starts: A zeros, norms and residuals ones."""
    model = ours(baseline(**{**SIZES, **changes}), expert_routing="token")
    if fresh:
        torch.manual_seed(0)
        model = type(model)(model.config)
    model.save_pretrained(directory)
    return directory


def make_artifact(root: Path, **changes: object) -> Path:
    """A verified artifact of a few hundred kilobytes, `root`/artifact, of `root`/checkpoint."""
    source = make_checkpoint(root / "checkpoint", **changes)
    verdicts = export_onnx(source, root / "artifact", OnnxOptions(max_length=300, max_batch=4))
    assert all(verdict.passed for verdict in verdicts)
    return root / "artifact"


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Change the manifest, and give it the files as they now are: what whoever made the artifact could have written."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    path.write_text(json.dumps(manifest))
