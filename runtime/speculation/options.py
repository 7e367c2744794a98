"""What a caller chooses: how tokens are guessed, checked against the model that they are guessed for."""

from dataclasses import dataclass

from runtime.artifact.manifest import Artifact
from runtime.backends.base import Session
from runtime.errors import RequestError
from runtime.slots import Slots
from runtime.speculation.costs import Costs
from runtime.speculation.draft import DraftProposer
from runtime.speculation.ngram import NgramProposer
from runtime.speculation.speculator import Speculator

METHODS = ("ngram",)
GUESSES = 15


@dataclass(frozen=True)
class Speculation:
    """How an engine guesses ahead: by n-grams, or by a `draft` model.

    `costs`: of the steps that check guesses. `guesses`: the most of a sequence in one step.
    """

    costs: Costs
    draft: Slots | None = None
    guesses: int = GUESSES

    def start(self, slots: int) -> Speculator:
        """Guesses for one scheduler of so many slots. Raises `RequestError` where the draft has not as many."""
        if self.draft is None:
            return Speculator(NgramProposer(), self.guesses, self.costs)
        most = self.draft.graph.max_batch
        if slots > most:
            raise RequestError(f"the draft serves up to {most} slots, and {slots} are asked for; take fewer slots")
        return Speculator(DraftProposer(self.draft, slots), self.guesses, self.costs)


def check_target(artifact: Artifact, session: Session) -> None:
    """Raise `RequestError` where the guesses for this model cannot be checked."""
    graph = artifact.graph
    if session.most_rows < 2:
        again = (
            f"its engine on {session.device_name} gives them of the last alone; use backend cpu or cuda"
            if graph.most_rows > 1
            else "export it again with wm-export onnx"
        )
        raise RequestError(f"{artifact.path}: speculation needs logits of several tokens a step; {again}")
    if graph.window is not None and is_recurrent(artifact):
        raise RequestError(
            f"{artifact.path}: has SSD states and caches that evict rows, which speculation cannot roll back together; "
            "generate without it"
        )


def check_draft(target: Artifact, draft: Artifact) -> None:
    """Raise `RequestError` where the draft's tokens are others, or it cannot be rolled back."""
    if draft.graph.labels is not None:
        raise RequestError(f"{draft.path}: is a classifier, and a draft is a language model")
    if draft.graph.vocabulary != target.graph.vocabulary:
        raise RequestError(
            f"{draft.path}: has {draft.graph.vocabulary} tokens, {target.path} has {target.graph.vocabulary}; expected "
            "a draft over the same tokenizer"
        )
    if is_recurrent(draft):
        raise RequestError(f"{draft.path}: has SSD states, which cannot be rolled back; expected a draft of attention")


def is_recurrent(artifact: Artifact) -> bool:
    """Whether a state sums up all tokens, so that it has no rows to forget."""
    return any("capacity" not in state.shape for state in artifact.graph.states)
