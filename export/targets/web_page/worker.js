// The model and its tokenizer, off the page's own thread. Everything is loaded from this folder.
// `?device=wasm` or `?device=webgpu` chooses where it runs; by default WebGPU where the browser has an adapter.

import {
  AutoModelForCausalLM,
  AutoTokenizer,
  InterruptableStoppingCriteria,
  TextStreamer,
  env,
} from "./runtime/transformers.min.js";

const here = new URL("./", self.location.href).href;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./"; // of the worker, as fetch reads it
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = `${here}runtime/`;
env.backends.onnx.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;

const stopping = new InterruptableStoppingCriteria();
let model, tokenizer, device;

async function chooseDevice() {
  const wanted = new URL(self.location.href).searchParams.get("device");
  if (wanted) return wanted;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? "webgpu" : "wasm";
}

// The codes become float32 weights once, as the model loads. Otherwise ONNX Runtime does it again for each token.
const sessionOptions = { extra: { session: { disable_quant_qdq: "1" } } };

async function load() {
  const start = performance.now();
  device = await chooseDevice();
  [tokenizer, model] = await Promise.all([
    AutoTokenizer.from_pretrained("model"),
    AutoModelForCausalLM.from_pretrained("model", { device, dtype: "fp32", session_options: sessionOptions }),
  ]);
  const name = model.config.name || "wm-models";
  self.postMessage({ type: "loaded", name, device, seconds: (performance.now() - start) / 1000 });
}

async function generate({ prompt, tokens, temperature }) {
  stopping.reset();
  const ids = [];
  let first = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => self.postMessage({ type: "text", text }),
    token_callback_function: (found) => {
      first ||= performance.now();
      ids.push(...found.map(Number));
    },
  });
  await model.generate({
    ...tokenizer(prompt),
    max_new_tokens: tokens,
    do_sample: temperature > 0,
    ...(temperature > 0 ? { temperature } : {}),
    streamer,
    stopping_criteria: stopping,
  });
  const seconds = (performance.now() - first) / 1000; // from the first token on: decode, without the prompt
  self.postMessage({ type: "done", ids, tokensPerSecond: ids.length > 1 ? (ids.length - 1) / seconds : 0, device });
}

const fail = (error) => self.postMessage({ type: "failed", reason: String(error?.message ?? error) });
const loading = load().catch(fail);

self.addEventListener("message", ({ data }) => {
  if (data.type === "stop") stopping.interrupt();
  else loading.then(() => generate(data)).catch(fail);
});
