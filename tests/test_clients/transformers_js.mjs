// Greedy ids of a left-padded batch, by transformers.js: DIRECTORY TOKENS PROMPTS, the last as JSON.
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [directory, tokens, prompts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = "/";
const model = await AutoModelForCausalLM.from_pretrained(directory);
const tokenizer = await AutoTokenizer.from_pretrained(directory);
tokenizer.padding_side = "left";
const inputs = tokenizer(JSON.parse(prompts), { padding: true });
const found = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
console.log(JSON.stringify(found.tolist().map((row) => row.slice(-Number(tokens)).map(Number))));
