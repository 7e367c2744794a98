"""What users have today, timed: `python -m export.rival transformers ARTIFACT PROMPT NEW ROUNDS THREADS`.

Weights do not change how long a step takes, so the rival gets random ones for the artifact's configuration.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers


def transformers_rate(directory: Path, prompt_length: int, new_tokens: int, rounds: int) -> float:
    """Tokens/s, median, of transformers' greedy `generate` with its own Doge in float32, batch 1."""
    config = transformers.DogeConfig.from_pretrained(directory)
    model = transformers.DogeForCausalLM(config).float().eval()
    model.generation_config.eos_token_id = None
    prompt = torch.randint(0, config.vocab_size, (1, prompt_length))
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        out: torch.Tensor = model.generate(  # type: ignore[attr-defined]
            prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        times.append(time.perf_counter() - started)
        assert out.shape[1] == prompt_length + new_tokens
    return new_tokens / median(times[1:])  # the first one warms up


def main() -> None:
    directory, (prompt_length, new_tokens, rounds, threads) = Path(sys.argv[2]), map(int, sys.argv[3:7])
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    rates = {"transformers": transformers_rate}
    rate = rates[sys.argv[1]](directory, prompt_length, new_tokens, rounds)
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
