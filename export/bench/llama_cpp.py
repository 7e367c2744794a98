"""llama.cpp beside an artifact: a Llama of the same sizes with random weights, as GGUF, run by node-llama-cpp.

llama.cpp has no Doge. A Llama of the same sizes has the same products, and no bias of keys.

S new tokens, C cache capacity, D hidden size, F intermediate size, V vocabulary, K key/value heads, d head size.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any, cast

import numpy as np

PROGRAM = Path(__file__).with_name("llama.mjs")
# GGUF's types, of 32 weights to a scale where there are scales, by the artifact's quantisation or dtype
TYPES = {"int8": "Q8_0", "int4": "Q4_0", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SETUP = "npm install -g node-llama-cpp and pip install gguf"


class Unfit(Exception):
    """Why llama.cpp cannot be run beside an artifact, in one line."""


def generator(directory: Path, capacity: int, threads: int) -> Callable[[list[int], int], list[float]]:
    """A function of a prompt's ids and a number of new tokens: the seconds that each of them took, the first with the
    prompt's. The Llama has the artifact's sizes and quantisation, and a cache for `capacity` tokens.

    NODE_PATH, by default npm's global folder, is where node-llama-cpp is found. Raises `Unfit`.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    graph = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["graph"]
    if config["model_type"] != "doge" or config.get("is_moe"):
        raise Unfit("llama.cpp has no model of these layers; expected a dense Doge")
    npm, node = shutil.which("npm"), shutil.which("node")
    if find_spec("gguf") is None or npm is None or node is None:
        raise Unfit(f"not installed: {SETUP}")
    folder = os.environ.get("NODE_PATH") or subprocess.check_output([npm, "root", "-g"], text=True).strip()
    if not Path(folder, "node-llama-cpp").is_dir():
        raise Unfit(f"{folder}: has no node-llama-cpp; {SETUP}")
    path = Path(mkdtemp()) / "model.gguf"
    write_llama(path, config, TYPES.get(graph["quantization"]) or TYPES[graph["dtype"]])
    process = subprocess.Popen(
        [node, str(PROGRAM), str(path), str(capacity), str(threads or len(os.sched_getaffinity(0)))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NODE_PATH": folder},
    )
    stdin, stdout = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
    loaded = stdout.readline()
    shutil.rmtree(path.parent)  # the process has it open
    if not loaded:
        raise Unfit(f"node-llama-cpp ended with code {process.wait()}")

    def run(ids: list[int], new_tokens: int) -> list[float]:
        stdin.write(json.dumps({"ids": ids, "new_tokens": new_tokens}) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    return run


def write_llama(path: Path, config: dict[str, Any], type_name: str) -> None:
    """A GGUF file of a Llama of a Doge configuration's sizes. Needs the package gguf.

    Matrices are of the GGUF type, vectors float32. Its tokens are spelt by their ids.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    kind, draw = GGMLQuantizationType[type_name], np.random.default_rng(0)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    narrow = config["num_key_value_heads"] * head
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType[f"{'ALL' if type_name == 'F32' else 'MOSTLY'}_{type_name}"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{token}>" for token in range(config["vocab_size"])])
    writer.add_token_merges(["< 0"])
    if isinstance(config["eos_token_id"], int):
        writer.add_eos_token_id(config["eos_token_id"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = draw.standard_normal((rows, columns), dtype=np.float32) * config["initializer_range"]
        writer.add_tensor(f"{name}.weight", quants.quantize(weights, kind), raw_dtype=kind)

    def vector(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    matrix("token_embd", config["vocab_size"], hidden)
    vector("output_norm")
    if not config["tie_word_embeddings"]:
        matrix("output", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        vector(f"blk.{layer}.attn_norm")
        matrix(f"blk.{layer}.attn_q", heads * head, hidden)
        matrix(f"blk.{layer}.attn_k", narrow, hidden)
        matrix(f"blk.{layer}.attn_v", narrow, hidden)
        matrix(f"blk.{layer}.attn_output", hidden, heads * head)
        vector(f"blk.{layer}.ffn_norm")
        matrix(f"blk.{layer}.ffn_gate", inner, hidden)
        matrix(f"blk.{layer}.ffn_up", inner, hidden)
        matrix(f"blk.{layer}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
