"""What a narrow dtype costs where keys are selected: divergence from float32, by keep window.

python tests/benchmarks/narrow_windows.py [--windows 64 128 256 512]

The eager shipped model, whose keep window is cut to w keys, reads 1024 tokens of the standard library's argparse in
float16 and in bfloat16. Columns: the KL divergence from the same model in float32, nats a token, mean and 99 %.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from wm_models import DogeForCausalLM, shipped_checkpoint

DTYPES = (torch.float16, torch.bfloat16)


def logits(ids: torch.Tensor, keep: int, dtype: torch.dtype) -> torch.Tensor:
    """Log probabilities (S, V), float64, of a model with a window of `keep` keys."""
    path = shipped_checkpoint()
    model = DogeForCausalLM.from_pretrained(path, keep_window_size=keep, dtype=torch.float32).eval().to(dtype)  # type: ignore[call-arg]
    return model(ids).logits[0].double().log_softmax(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256, 512])
    options = parser.parse_args()
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, 1000:2024]
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table = Table("w", *(f"{name}: {figure}" for name in names for figure in ("mean KL", "99 %")))
    for keep in options.windows:
        exact, cells = logits(ids, keep, torch.float32), []
        for dtype in DTYPES:
            divergence = (exact.exp() * (exact - logits(ids, keep, dtype))).sum(-1)
            cells += [f"{divergence.mean().item():.1e}", f"{divergence.quantile(0.99).item():.1e}"]
        table.add_row(str(keep), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
