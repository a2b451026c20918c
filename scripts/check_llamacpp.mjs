// What llama.cpp makes of a GGUF file: token ids of texts, greedy answers.
//
//   node check_llamacpp.mjs MODEL.gguf < requests.jsonl > replies.jsonl
//
// A request is {"text": ...} -> {"ids": [...]}, special tokens read as such and
// none added; or {"ids": [...], "most": 64} -> {"answer": [...]}, the likeliest
// tokens up to a stop token, which is included. Needs the npm package
// node-llama-cpp, which ships a prebuilt llama.cpp, where node finds it.

import process from 'node:process';
import readline from 'node:readline';
import path from 'node:path';
import {createRequire} from 'node:module';
import {pathToFileURL} from 'node:url';

const here = createRequire(path.join(process.cwd(), 'package.json'));
const {getLlama} = await import(
  pathToFileURL(here.resolve('node-llama-cpp')).href);

const llama = await getLlama({gpu: false, build: 'never', logLevel: 'error'});
const model = await llama.loadModel({modelPath: process.argv[2]});
let sequence = null;

async function answer(ids, most) {
  if (sequence === null) {
    const context = await model.createContext({
      contextSize: 2048,
      threads: 1, // Several wait for one another by spinning.
      // By default keys and values are rounded to float16.
      experimentalKvCacheKeyType: 'F32',
      experimentalKvCacheValueType: 'F32',
    });
    sequence = context.getSequence();
  }
  await sequence.clearHistory();
  const out = [];
  const options = {temperature: 0, yieldEogToken: true};
  for await (const token of sequence.evaluate(ids, options)) {
    out.push(token);
    if (out.length === most || model.isEogToken(token)) break;
  }
  return out;
}

for await (const line of readline.createInterface({input: process.stdin})) {
  const request = JSON.parse(line);
  const reply = request.ids === undefined
    ? {ids: model.tokenize(request.text, true)}
    : {answer: await answer(request.ids, request.most)};
  process.stdout.write(JSON.stringify(reply) + '\n');
}
process.exit(0);
