"""A target and a quantisation scheme from outside the packages: `python -m test_export.toy` is wm-export with both."""

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
import torch

from export.cli import main
from export.quantization.schemes import SCHEMES, Codes, Scheme, Weight
from export.targets.base import Draft, Table, Target
from export.targets.onnx_artifact import ONNX, OnnxOptions
from export.targets.registry import TARGETS
from export.verification.judging import Expected
from runtime import ArtifactError
from runtime.artifact.manifest import Artifact, Manifest
from runtime.backends.base import Session
from runtime.console import option

LISTING = "operators.txt"


@dataclass(frozen=True)
class ListedOptions:
    """What the toy target may be asked for."""

    max_length: int = option(80, "Most tokens a slot holds.")
    forget: str = option("", "An operator to leave out of the listing, which is then wrong.")


class Listed(Target[ListedOptions]):
    """An ONNX artifact with a listing of its graph's operators, without which it does not open."""

    name = "listed"
    help = "Write an ONNX artifact and list its operators."
    options = ListedOptions

    def write(self, draft: Draft, options: ListedOptions) -> Expected:
        expected = ONNX.write(draft, OnnxOptions(max_length=options.max_length, max_batch=2))
        counts = operators(draft.directory / draft.manifest.graph.file)
        del counts[options.forget]
        listing = "\n".join(f"{name} {count}" for name, count in sorted(counts.items()))
        (draft.directory / LISTING).write_text(listing)
        draft.add_section("listing", {"file": LISTING, "kinds": len(counts)})
        return expected

    def open(self, artifact: Artifact) -> Session:
        listing = (artifact.path / LISTING).read_text().splitlines()
        if len(listing) != len(operators(artifact.path / artifact.graph.file)):
            raise ArtifactError(f"{artifact.path / LISTING}: is not the listing of this graph")
        return super().open(artifact)

    def tables(self, manifest: Manifest) -> list[Table]:
        section = manifest.sections.get("listing")
        return [Table("Listing", ["file", "kinds"], [[section["file"], str(section["kinds"])]])] if section else []

    def summary(self, directory, manifest: Manifest) -> list[str]:
        return [f"listed: {manifest.sections['listing']['kinds']} kinds of operators in {directory / LISTING}"]


def operators(path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


def round_to_powers(weight: Weight) -> Codes:
    """Scales that are powers of two, so that dequantisation is exact; the largest weight of a block takes any code."""
    blocks = weight.values.view(len(weight.values), -1, weight.block)
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(min=1e-12) / 127)))
    return (blocks / scales[..., None]).round().view_as(weight.values), scales


LISTED = Listed()
POWERS = Scheme("powers", bits=8, block=64, kl_limit=6e-3, calibrates=False, round=round_to_powers)

if __name__ == "__main__":
    TARGETS[LISTED.name] = LISTED
    SCHEMES[POWERS.name] = POWERS
    main()
