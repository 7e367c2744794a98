"""What a bench with baselines measured, for a person: the rows of a table, and a picture."""

from pathlib import Path

from runtime import bench
from runtime.bench import Result


def table_rows(result: Result) -> list[tuple[str, str]]:
    """Each measure by name, with its value and unit: the artifact's, its share of the floor, and each baseline's."""
    rows = bench.table_rows(result)
    if "share_of_floor" in result:
        rows += [
            ("floor: linear layers alone", f"{result['floor_steps_per_second']:.1f} steps/s"),
            ("decode as a share of the floor", f"{result['share_of_floor']:.0%}"),
            ("prefill as a share of its floor", f"{result['prefill_share_of_floor']:.0%}"),
            ("large float32 product", f"{result['product_flops'] / 1e9:.0f} GFLOP/s"),
            ("prefill, work of its linear layers, of that rate", f"{result['prefill_share_of_product']:.0%}"),
        ]
    if "batch_floor_over_one" in result:
        rows.append((f"the floor's batch {result['batch']}, times batch 1", f"{result['batch_floor_over_one']:.2f}"))
    for name, baseline in result["baselines"].items():
        if "failed" in baseline:
            rows.append((name, baseline["failed"]))
            continue
        rows.append((f"{name}, prefill and decode", f"{baseline['generate_tokens_per_second']:.1f} tokens/s"))
        rows.append((f"{name}, prefill", f"{baseline['prefill_tokens_per_second']:.0f} tokens/s"))
        rows.append((f"{name}, decode", f"{baseline['decode_tokens_per_second']:.1f} tokens/s"))
        rows.append((f"times as fast as {name}", f"{baseline['times_as_fast']:.2f}"))
        if "floor_times_as_fast" in baseline:
            rows.append((f"the floor is times as fast as {name}", f"{baseline['floor_times_as_fast']:.2f}"))
    return rows


def plot(result: Result, path: Path) -> None:
    """Draw decode tokens/s over context length: the artifact, its baselines, and what memory bandwidth allows."""
    beside = {name: found["contexts"] for name, found in result["baselines"].items() if "failed" not in found}
    bench.plot(result, path, beside, result.get("bandwidth_limits"))
