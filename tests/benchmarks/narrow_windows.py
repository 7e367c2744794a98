"""What a narrow dtype costs where keys are selected: divergence from float32, by keep window.

python tests/benchmarks/narrow_windows.py [--windows 64 128 256 512] [--model DIR]

The eager shipped model, or a checkpoint of its tokenizer, whose keep window is cut to w keys, reads 1024 tokens of the
standard library's argparse. Figures are mean KL divergences from float32, nats a token. `weights`: they alone are
rounded to the dtype, which no kernel can undo. `model`: all is in the dtype. `transformers`: its own Doge in the
dtype, beside its own float32.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from wm_models import DogeForCausalLM, shipped_checkpoint

DTYPES = (torch.float16, torch.bfloat16)


def divergence(exact: torch.Tensor, found: torch.Tensor) -> str:
    """Mean KL divergence of log probabilities (S, V)."""
    return f"{(exact.exp() * (exact - found)).sum(-1).mean().item():.1e}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--model", type=Path, default=shipped_checkpoint())
    options = parser.parse_args()
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, 1000:2024]

    def logits(family: type, keep: int, weights: torch.dtype, rest: torch.dtype) -> torch.Tensor:
        """Log probabilities (S, V), float64, of a model with a window of `keep` keys."""
        model = family.from_pretrained(options.model, keep_window_size=keep, dtype=torch.float32)
        return model.eval().to(weights).to(rest)(ids).logits[0].double().log_softmax(-1)

    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table = Table("w", *(f"{name}: {figure}" for name in names for figure in ("weights", "model", "transformers")))
    for keep in options.windows:
        cells = []
        exact, theirs = (
            logits(family, keep, torch.float32, torch.float32)
            for family in (DogeForCausalLM, transformers.DogeForCausalLM)
        )
        for dtype in DTYPES:
            cells += [
                divergence(exact, logits(DogeForCausalLM, keep, dtype, torch.float32)),
                divergence(exact, logits(DogeForCausalLM, keep, dtype, dtype)),
                divergence(theirs, logits(transformers.DogeForCausalLM, keep, dtype, dtype)),
            ]
        table.add_row(str(keep), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
