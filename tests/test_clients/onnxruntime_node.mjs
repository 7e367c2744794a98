// Greedy ids by onnxruntime-node from a step graph: GRAPH and [ids, steps, [[state, its output, its shape], ...]].
import ort from "onnxruntime-node";

const [path, plan] = process.argv.slice(2);
const [ids, steps, states] = JSON.parse(plan);
const int64 = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values.map(BigInt)), shape);
const session = await ort.InferenceSession.create(path, { logSeverityLevel: 4 });
const caches = Object.fromEntries(
  states.map(([name, , shape]) => {
    const size = shape.reduce((product, dim) => product * dim, 1);
    return [name, new ort.Tensor("float32", new Float32Array(size), shape)];
  }),
);
const found = [];
let length = 0, chunk = ids;
while (found.length < steps) {
  const outputs = await session.run({
    input_ids: int64(chunk, [1, chunk.length]),
    cache_lengths: int64([length], [1]),
    sequence_lengths: int64([chunk.length], [1]),
    logits_index: int64([chunk.length - 1], [1, 1]),
    ...caches,
  });
  for (const [name, output] of states) caches[name] = outputs[output];
  length += chunk.length;
  chunk = [outputs.logits.data.reduce((best, value, at, all) => (value > all[best] ? at : best), 0)];
  found.push(chunk[0]);
}
console.log(JSON.stringify(found));
