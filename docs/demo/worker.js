// The network in a thread of its own, so that the page stays alive: X-rays in, volume out.

import * as ort from "./vendor/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers (COOP, COEP) that plain web servers do not send
let session;

/** {model, bytes, xrays, edge} -> messages {loaded} with shares of the download, then {volume, seconds} or {error}. */
self.onmessage = async ({ data }) => {
  try {
    session ??= await ort.InferenceSession.create(await download(data.model, data.bytes));
    const start = performance.now();
    const shape = [1, 2, data.edge, data.edge];
    const { volume } = await session.run({ xrays: new ort.Tensor("float32", data.xrays, shape) });
    self.postMessage({ volume: volume.data, seconds: (performance.now() - start) / 1000 });
  } catch (error) {
    self.postMessage({ error: `The network did not run: ${error.message}` });
  }
};

/** The bytes of a file, with messages on the way. */
async function download(url, length) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be loaded (${answer.status})`);
  const bytes = new Uint8Array(length);
  let loaded = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (loaded + value.length > length) throw new Error(`${url} is longer than about.json says`);
    bytes.set(value, loaded);
    loaded += value.length;
    self.postMessage({ loaded: loaded / length });
  }
  if (loaded < length) throw new Error(`${url} is shorter than about.json says`);
  return bytes;
}
