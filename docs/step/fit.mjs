// Fit a picture in a browser, or in Node, with what `flashdip export-step` wrote:
// onnxruntime-web, nothing else. See docs/step.md for a page around it.

// Read a safetensors file: the length of a header, the header, the numbers.
export function readState(ort, content) {
  const end = 8 + Number(new DataView(content).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(content.slice(8, end)));
  const state = {};
  for (const [name, tensor] of Object.entries(header)) {
    const [start, stop] = tensor.data_offsets.map((offset) => end + offset);
    const numbers = content.slice(start, stop); // a copy, and so aligned
    state[name] =
      tensor.dtype === "I64"
        ? new ort.Tensor("int64", new BigInt64Array(numbers), tensor.shape)
        : new ort.Tensor("float32", new Float32Array(numbers), tensor.shape);
  }
  return state;
}

// Run the step so often; return the picture, a tensor [1, C, H, W], and the last loss.
export async function fit(ort, model, state, iterations, progress = () => {}) {
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  let made;
  for (let iteration = 1; iteration <= iterations; iteration++) {
    made = await session.run(state);
    for (const name of session.outputNames) {
      if (name.startsWith("next_")) state[name.slice("next_".length)] = made[name];
    }
    progress(iteration, made.loss.data[0]);
  }
  await session.release();
  return { image: made.image, loss: made.loss.data[0] };
}
