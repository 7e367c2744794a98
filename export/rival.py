"""What users have today, timed: `python -m export.rival NAME ARTIFACT PROMPT NEW ROUNDS THREADS`.

Weights do not change how long a step takes, so the rival gets random ones for the artifact's configuration.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers

from wm_models import DogeConfig, DogeForCausalLM


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


def compiled_rate(directory: Path, prompt_length: int, new_tokens: int, rounds: int) -> float:
    """Tokens/s, median, of this project's own model under torch.compile with static caches: greedy, batch 1.

    On the GPU where there is one, in the artifact's dtype, each decode step replayed as a CUDA graph.
    """
    graph = json.loads((directory / "manifest.json").read_text())["graph"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DogeForCausalLM(DogeConfig.from_pretrained(directory)).eval()
    model.to(dtype=getattr(torch, graph["dtype"]), device=device)  # type: ignore[call-arg]
    step = torch.compile(model.step, fullgraph=True, mode="reduce-overhead" if device == "cuda" else "default")
    capacity = min(size for size in graph["capacities"] if size >= prompt_length + new_tokens)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_length), device=device)
    times = []
    with torch.inference_mode():
        caches = model.new_caches(1, capacity)
        for cache in caches:
            for state in cache:
                torch._dynamo.mark_static_address(state)
        for _ in range(rounds + 2):  # a prompt and a token compile apart, and a CUDA graph is recorded the second time
            started = time.perf_counter()
            ids, held = prompt, 0
            for _ in range(new_tokens):
                lengths = (torch.tensor([held], device=device), torch.tensor([ids.shape[1]], device=device))
                logits, caches = step(ids, *lengths, caches)
                held += ids.shape[1]
                ids = torch.tensor([[int(logits[0, -1].argmax())]], device=device)
            times.append(time.perf_counter() - started)
    return new_tokens / median(times[2:])


def main() -> None:
    directory, (prompt_length, new_tokens, rounds, threads) = Path(sys.argv[2]), map(int, sys.argv[3:7])
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    rates = {"transformers": transformers_rate, "torch-compile": compiled_rate}
    rate = rates[sys.argv[1]](directory, prompt_length, new_tokens, rounds)
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
