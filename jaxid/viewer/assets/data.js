"use strict";
// Data: what the page holds, decoded on first use.

const MANIFEST = JSON.parse(document.getElementById("manifest").textContent);
const PICTURES = JSON.parse(document.getElementById("pictures").textContent);
const MISSING = -32768;
let block = null;

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("arrays").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  block = await new Response(stream).arrayBuffer();
}

const decoded = new Map();
function array(index) {
  if (!decoded.has(index)) {
    const { shape, offset, kind, low, step } = MANIFEST.arrays[index];
    const count = shape.reduce((a, b) => a * b, 1);
    let values = new { float: Float32Array, fixed: Int16Array, integer: Int32Array }[kind](block, offset, count);
    if (kind === "fixed") {
      values = Float32Array.from(values, (v) => (v === MISSING ? NaN : low + (v - MISSING - 1) * step));
    }
    decoded.set(index, { shape, values });
  }
  return decoded.get(index);
}

// A run's axes: their sizes, the product of them, and the step from one entry to the next.
function layout(run) {
  if (!run.layout) {
    const sizes = run.axes.map(([, entries]) => entries.length);
    const strides = sizes.map((_, k) => sizes.slice(k + 1).reduce((a, b) => a * b, 1));
    const names = run.axes.map(([name]) => name);
    let column = names.indexOf("layer");
    if (column < 0) column = names.length - 1;
    run.layout = { sizes, strides, names, column, total: sizes.reduce((a, b) => a * b, 1) };
  }
  return run.layout;
}

// The flat index of a selection: an entry for every axis.
const flat = (run, chosen) => layout(run).strides.reduce((sum, stride, k) => sum + stride * chosen[k], 0);

// Where the answers without an edit stand for an item and a flat index; axes they do not depend on have length 1.
function beforeAt(run, item, at) {
  const { sizes, strides } = layout(run);
  const { shape, values } = array(run.before);
  let place = item;
  sizes.forEach((size, k) => {
    const entry = Math.floor(at / strides[k]) % size;
    place = place * shape[k + 1] + (shape[k + 1] === 1 ? 0 : entry);
  });
  return [values[2 * place], values[2 * place + 1]];
}

function afterAt(run, item, at) {
  const { values } = array(run.after);
  const place = 2 * (item * layout(run).total + at);
  return [values[place], values[place + 1]];
}

// Names of the two answers: the words if all items have the same, else what they are.
function answerNames(run) {
  const { wordPairs, truth } = run.items;
  if (wordPairs.length === 1) return wordPairs[0];
  return truth.every((one) => one === 0) ? ["correct answer", "wrong answer"] : ["first answer", "second answer"];
}

// The numbers that a heat map can show.
function valuesOf(run) {
  const found = [];
  if (run.after !== null) {
    const [first, second] = answerNames(run);
    found.push({ name: `change of log p(${first}) − log p(${second})`, unit: "nats", signed: true, of: (b, a) => a[0] - a[1] - b[0] + b[1] });
    found.push({ name: `change of log p(${first})`, unit: "nats", signed: true, of: (b, a) => a[0] - b[0] });
    found.push({ name: `change of log p(${second})`, unit: "nats", signed: true, of: (b, a) => a[1] - b[1] });
  }
  return found.concat(run.values);
}

// A value of all items, [items × total].
function numbers(run, index) {
  run.numbers ??= new Map();
  if (!run.numbers.has(index)) {
    const value = valuesOf(run)[index];
    const { total } = layout(run), count = run.items.key.length;
    let found;
    if (value.of) {
      found = new Float32Array(count * total);
      for (let item = 0; item < count; item++)
        for (let at = 0; at < total; at++) found[item * total + at] = value.of(beforeAt(run, item, at), afterAt(run, item, at));
    } else {
      found = array(value.array).values;
    }
    run.numbers.set(index, found);
  }
  return run.numbers.get(index);
}

const shown = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "–");
