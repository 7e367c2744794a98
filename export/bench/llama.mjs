// llama.cpp, by node-llama-cpp, generating greedily from prompts of token ids.
//
// node llama.mjs MODEL.gguf CAPACITY THREADS: a line once the model is loaded, and for each line
// {"ids": […], "new_tokens": n} of stdin one with the seconds that each new token took.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const found = createRequire(import.meta.url).resolve("node-llama-cpp"); // looks into NODE_PATH
const {getLlama} = await import(pathToFileURL(found));
const [modelPath, capacity, threads] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
  contextSize: Number(capacity), batchSize: Number(capacity), threads: Number(threads),
});
const sequence = context.getSequence();
console.log("loaded");
for await (const line of createInterface({input: process.stdin})) {
  const {ids, new_tokens: newTokens} = JSON.parse(line);
  await sequence.clearHistory();
  const times = [performance.now()];
  for await (const _ of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    times.push(performance.now());
    if (times.length > newTokens) break;
  }
  console.log(JSON.stringify(times.slice(1).map((time, index) => (time - times[index]) / 1000)));
}
process.exit(0);
