"""A corpus and a recipe small enough to train in seconds."""

from pathlib import Path

import pytest

TINY = {
    "held_out": ["held.py"],
    "vocabulary": 300,
    "steps": 8,
    "sequence_length": 32,
    "batch_size": 4,
    "device_batch_size": 2,
    "learning_rate": 5e-3,
    "precision": "fp32",
    "compile": False,
    "log_every": 1,
    "evaluate_every": 3,
    "save_every": 2,
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_corpus(folder: Path) -> Path:
    """A folder of four documents to train on and one to hold out."""
    for number in range(4):
        lines = (f"def function_{i}(value_{number}):\n    return value_{number} + {i * i}\n\n" for i in range(25))
        (folder / f"{number}.py").write_text("".join(lines))
    (folder / "held.py").write_text("".join(f"def function_{i}(value):\n    return value + {i}\n\n" for i in range(9)))
    return folder
