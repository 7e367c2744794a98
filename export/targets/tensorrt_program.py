"""The program that drives TensorRT's parser and builder, in a process of its own: a compiler can crash.

It is run as a file and imports nothing of this project. It reads one JSON object, the order, from stdin, and writes
JSON lines, the events, to the file descriptor that the order names:

    {"stage": TEXT, "total": N}           a stage begins; where a total is known, it counts up to that
    {"done": N}                           so much more of it is done
    {"refused": TEXT, "nodes": [NAME]}    the last one, where the model cannot be built: the builder's words
    {"built": …}                          the last one: the profiles, the layers, seconds, bytes

B batch, S new tokens, C cache capacity, H query heads, K key/value heads, d head size.
"""

import importlib
import json
import os
import re
import sys
import time
from collections import Counter
from typing import Any


class Refused(Exception):
    """The builder's own words, and the nodes that it names."""

    def __init__(self, words: str, nodes: list[str]):
        super().__init__(words)
        self.nodes = nodes


def make_logger(trt: Any, log: Any) -> Any:
    """A logger that writes every message to `log` and keeps the errors, which say why a build failed."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            log.write(f"{severity.name}: {message}\n")
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Logger()


def make_monitor(trt: Any, tell: Any) -> Any:
    """Passes on how far the builder's outermost phase is."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: set[str] = set()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost.add(name)
                tell(stage=name, total=steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.outermost:
                tell(done=1)
            return True

        def phase_finish(self, name: str) -> None:
            self.outermost.discard(name)

    return Monitor()


class Build:
    """One order: a model parsed into a network, and the engine built of it."""

    def __init__(self, order: dict[str, Any], log: Any, tell: Any):
        self.order, self.tell = order, tell
        self.trt = importlib.import_module(order["module"])
        self.logger = make_logger(self.trt, log)
        self.builder = self.trt.Builder(self.logger)

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        network, parser = self._parse()
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        attentions = [self._attention(layer) for layer in layers if layer.type.name == "ATTENTION_OUTPUT"]
        profiles, fused = [], []
        for options in self.order["profiles"]:
            tried = [[self._is_fused(attention, option) for attention in attentions] for option in options]
            best = max(range(len(options)), key=lambda index: (sum(tried[index]), -index))
            profiles.append(options[best])
            fused.append(tried[best])
        for index, attention in enumerate(attentions):
            # Where it has a fused kernel in every profile the builder must use it; else it may take the layer apart.
            attention.decomposable = not all(row[index] for row in fused)
        self.tell(stage="building")
        engine = self._build(network, profiles)
        with open(self.order["engine"], "wb") as file:
            file.write(engine)
        del parser  # its weights back the network until the engine is there
        return {
            "version": self.trt.__version__,
            "profiles": profiles,
            "counts": dict(Counter(layer.type.name for layer in layers).most_common()),
            "attention": [
                {"name": attention.name, "fused": [row[index] for row in fused]}
                for index, attention in enumerate(attentions)
            ],
            "caches": [
                {"name": layer.name, "input": layer.get_input(0).name, "output": layer.get_output(0).name}
                for layer in layers
                if layer.type.name == "KV_CACHE_UPDATE"
            ],
            "quantised": [
                {"name": layer.name, "type": layer.get_input(0).dtype.name}
                for layer in layers
                if layer.type.name == "DEQUANTIZE"
            ],
            "rotary": [layer.name for layer in layers if layer.type.name == "ROTARY_EMBEDDING"],
            "bytes": os.path.getsize(self.order["engine"]),
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak_bytes(),
        }

    def _parse(self) -> tuple[Any, Any]:
        self.tell(stage="parsing")
        # Networks are strongly typed: precision is the model's. Older releases want to be told.
        strong = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self.builder.create_network(0 if strong is None else 1 << int(strong))
        parser = self.trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(self.order["model"]):
            faults = [parser.get_error(index) for index in range(parser.num_errors)]
            operators = ", ".join(sorted({fault.node_operator() for fault in faults if fault.node_operator()}))
            raise Refused(f"{operators}: {self._words()}", [f.node_name() for f in faults if f.node_name()])
        return network, parser

    def _attention(self, layer: Any) -> Any:
        layer.__class__ = self.trt.IAttentionOutputLayer  # the bindings hand out the base class
        return layer.attention

    def _is_fused(self, attention: Any, profile: dict[str, Any]) -> bool:
        """Whether the builder has a fused kernel for this attention in `profile`: it is asked, with nothing else."""
        network = self.builder.create_network(0)
        query, key, value = (attention.get_input(index) for index in range(3))
        tensors = []
        for name, source in (("query", query), ("key", key), ("value", value), ("mask", attention.mask)):
            if source is not None:
                shape = list(source.shape)
                shape[0] = -1
                if name in ("query", "mask"):
                    shape[2] = -1
                tensors.append(network.add_input(name, source.dtype, tuple(shape)))
        probe = network.add_attention(*tensors[:3], attention.norm_op, False)
        if attention.mask is not None:
            probe.mask = tensors[3]
        network.mark_output(probe.get_output(0))
        try:
            self._build(network, [profile])
        except Refused:
            return False
        return True

    def _build(self, network: Any, profiles: list[dict[str, Any]]) -> Any:
        config = self.builder.create_builder_config()
        config.clear_flag(self.trt.BuilderFlag.TF32)  # float32 means float32
        own = getattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if own is not None:  # with it nothing is allocated on the way, so a step can be captured
            config.set_flag(own)
        if self.order["capabilities"]:
            config.num_compute_capabilities = len(self.order["capabilities"])
            for index, name in enumerate(self.order["capabilities"]):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, name), index)
        monitor = make_monitor(self.trt, self.tell)
        config.progress_monitor = monitor
        for bounds in profiles:
            profile = self.builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                sequence = 1 if tensor.name == "input_ids" else 2 if tensor.name in ("query", "mask") else None
                shapes = []
                for batch, length in zip(bounds["batch"], bounds["sequence"], strict=True):
                    shape = list(tensor.shape)
                    shape[0] = batch
                    if sequence is not None:
                        shape[sequence] = length
                    shapes.append(tuple(shape))
                profile.set_shape(tensor.name, *shapes)
            config.add_optimization_profile(profile)
        self.logger.errors.clear()
        engine = self.builder.build_serialized_network(network, config)
        if engine is None:
            words = self._words()
            names = (network.get_layer(index).name for index in range(network.num_layers))
            raise Refused(
                words, [name for name in names if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words)]
            )
        return engine

    def _words(self) -> str:
        said = [one_line(error) for error in self.logger.errors]
        told = [words for words in said if "ERROR:" in words or "Error Code" in words]  # the rest is decoration
        return "; ".join(dict.fromkeys(told or said)) or "it gave no reason"


def peak_bytes() -> int:
    """The largest resident size of this process so far; ru_maxrss would begin at its parent's."""
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+)", status.read())[1]) * 1024  # type: ignore[index]


def one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    order = json.loads(sys.stdin.read())

    def tell(**event: Any) -> None:
        os.write(order["events"], (json.dumps(event) + "\n").encode())

    with open(order["log"], "a", buffering=1) as log:
        try:
            built = Build(order, log, tell).run()
        except Refused as refusal:
            tell(refused=str(refusal), nodes=refusal.nodes)
        else:
            tell(built=built)


if __name__ == "__main__":
    main()
