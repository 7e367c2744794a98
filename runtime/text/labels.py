"""A classifier's labels: what they are called, and how likely its logits make each of them.

B batch.
"""

import numpy as np

from runtime.artifact.manifest import Artifact
from runtime.errors import ArtifactError

CONFIG = "config.json"


def label_names(artifact: Artifact) -> tuple[str, ...]:
    """The labels' names in the order of the logits, from config.json's `id2label`; none of a language model.

    Raises `ArtifactError` where it does not name every label.
    """
    numbers = [str(number) for number in range(artifact.graph.labels or 0)]
    names = artifact.read_json(CONFIG).get("id2label") if numbers else None
    if names is None:
        return tuple(f"LABEL_{number}" for number in numbers)  # as transformers calls them
    if not isinstance(names, dict) or names.keys() != set(numbers) or {type(name) for name in names.values()} != {str}:
        raise ArtifactError(
            f"{artifact.path / CONFIG}: id2label does not name the graph's {len(numbers)} labels; expected a text for "
            f"each of 0 to {len(numbers) - 1}"
        )
    return tuple(names[number] for number in numbers)


def label_scores(artifact: Artifact, logits: np.ndarray) -> np.ndarray:
    """Logits (B, labels) to what transformers' pipeline reports, float64.

    Probabilities that sum to one; where config.json's `problem_type` says that several labels may hold, or there is
    one label, a probability of each; of a regression the logits themselves.
    """
    problem, logits = artifact.read_json(CONFIG).get("problem_type"), logits.astype(np.float64)
    if problem == "regression":
        return logits
    if problem == "multi_label_classification" or logits.shape[1] == 1:
        return np.exp(-np.logaddexp(0, -logits))
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
