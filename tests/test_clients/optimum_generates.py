"""Greedy ids of a left-padded batch, by optimum: DIRECTORY TOKENS PROMPTS, the last as JSON.

Run by the Python of an environment of its own: optimum-onnx needs an earlier transformers than this project.
"""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer

directory, tokens, prompts = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(directory, subfolder="onnx", file_name="model.onnx")
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
inputs = tokenizer(json.loads(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
found = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
print(json.dumps(found[:, -int(tokens) :].tolist()))
