// The page: it hands a prompt to the worker, which holds the model, and shows what comes back.

const element = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js" + location.search, import.meta.url), { type: "module" });
const show = (text) => { element("status").textContent = text; };

function setRunning(running) {
  element("run").disabled = running;
  element("stop").disabled = !running;
}

const answers = {
  loaded({ name, device, seconds }) {
    element("title").textContent = `${name} in the browser`;
    show(`Loaded in ${seconds.toFixed(1)} s; runs on ${device}.`);
    document.body.dataset.device = device;
    setRunning(false);
  },
  text({ text }) {
    element("output").textContent += text;
  },
  done({ ids, tokensPerSecond, device }) {
    element("output").dataset.ids = JSON.stringify(ids);
    show(`${ids.length} tokens, ${tokensPerSecond.toFixed(1)} tokens/s on ${device}.`);
    setRunning(false);
  },
  failed({ reason }) {
    show(`It failed: ${reason}`);
    document.body.dataset.failed = reason;
    setRunning(false);
  },
};

worker.addEventListener("message", ({ data }) => answers[data.type](data));
worker.addEventListener("error", (event) => answers.failed({ reason: event.message || "the worker did not start" }));

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  setRunning(true);
  element("prompted").textContent = element("prompt").value;
  element("output").textContent = "";
  delete element("output").dataset.ids;
  show("Reading the prompt …");
  worker.postMessage({
    type: "generate",
    prompt: element("prompt").value,
    tokens: Number(element("tokens").value),
    temperature: Number(element("temperature").value),
  });
});
element("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
