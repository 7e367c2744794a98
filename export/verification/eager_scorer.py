"""The eager model as a scorer of texts, for an artifact to be compared with.

S tokens of a window, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer

from export.errors import ExportError
from export.source import Source
from export.verification.reference import eager_logits
from runtime.artifact.manifest import TOKENIZER
from runtime.evaluation.scorers import PIECE
from wm_models.decoder import DecoderForCausalLM


class EagerScorer:
    """A checkpoint's model in float32 on the CPU; see `runtime.evaluation.scorers.Scorer`.

    `source` and `seed`: see `export.source.Source`. Raises `ExportError` for a classifier, and what that raises.
    """

    def __init__(self, source: str, seed: int = 0):
        origin = Source(source, seed)
        model, text = origin.load_model(), origin.read_text(TOKENIZER)
        if not isinstance(model, DecoderForCausalLM):
            raise ExportError(f"{source}: is a classifier, which predicts no text; name a language model")
        self.model, self.name = model, source
        self.vocabulary: int = model.config.vocab_size
        self.tokenizer = None if text is None else Tokenizer.from_buffer(text)
        self.most: int = model.config.longest_sequence

    def rows(self, ids: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """Logits (n, V), float32, after each of `ids` (S,) from `first` on, `PIECE` rows at a time, by one pass."""
        logits = eager_logits(self.model, torch.from_numpy(ids)[None], np.arange(first, len(ids)))[0]
        for start in range(0, len(logits), PIECE):
            yield logits[start : start + PIECE]
