"""Three tasks made of the standard library's sources: choices, the likelihood of texts, and completions."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

MODULES = ("bisect", "calendar", "colorsys", "fnmatch", "heapq", "shlex", "statistics", "string", "textwrap", "zipfile")

CHOICE = """
task: wm_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
LIKELIHOOD = """
task: wm_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
COMPLETION = """
task: wm_completion
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{line}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def module_sources() -> list[str]:
    """What the tests' tasks are made of."""
    return [inspect.getsource(__import__(name)) for name in MODULES]


def write_tasks(folder: Path, sources: Sequence[str], count: int) -> list[str]:
    """Write the tasks and `count` documents of each into `folder`; returns the tasks' names.

    A choice: 30 characters that follow 200 of a source, among beginnings of other lines. A completion: the second half
    of a source's line, after all that is before it.
    """
    lines = [line for source in sources for line in source.splitlines() if line.startswith("    ") and len(line) > 24]
    choices, texts, completions = [], [], []
    for index in range(count):
        source, round_ = sources[index % len(sources)], index // len(sources)
        start = 230 * round_
        context = source[start : start + 200]
        right = source[start + 200 : start + 230]
        wrong = [lines[(31 * index + 7 * step) % len(lines)][:30] for step in range(1, 4)]
        answer = index % 4
        choices.append({"context": context, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer})
        texts.append({"text": source[start : start + 700 + 200 * (index % len(sources))]})
        line = next(place for place in range(300 + start, len(source)) if source.startswith("\n    ", place)) + 1
        end = source.index("\n", line)
        cut = (line + end + 1) // 2
        completions.append({"prompt": source[max(0, cut - 900) : cut], "line": source[cut:end]})
    names = []
    for template, documents in ((CHOICE, choices), (LIKELIHOOD, texts), (COMPLETION, completions)):
        name = template.split()[1]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}.yaml").write_text(template.format(data=data))
        names.append(name)
    return names
