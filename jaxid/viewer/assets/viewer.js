// The page: state, lists, panels, keys.

const $ = (id) => document.getElementById(id);
const ROW = 44;
const LONG = 120; // characters of a question, beyond which lists show the item's name
const state = { content: 0, item: 0, chosen: [], value: 0, over: "item", group: 0, word: 0, listed: [], lists: 0 };

const content = () => MANIFEST.contents[state.content];
const isRun = () => content().kind === "run";
const isMaps = () => content().kind === "maps";
const planeOf = () => content().plane ?? null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// --- what is listed -------------------------------------------------------------------------------------------------

const saysFirst = ([first, second]) => first >= second;
const here = () => flat(content(), state.chosen);
const valueHere = (item) => numbers(content(), state.value)[item * layout(content()).total + here()];
function largest(item) {
  const { total } = layout(content()), found = numbers(content(), state.value);
  let most = 0;
  for (let at = item * total; at < (item + 1) * total; at++) if (Math.abs(found[at]) > most) most = Math.abs(found[at]);
  return most;
}
const correct = (item) => (saysFirst(beforeAt(content(), item, here())) ? 0 : 1) === content().items.truth[item];
const flipped = (item) => saysFirst(beforeAt(content(), item, here())) !== saysFirst(afterAt(content(), item, here()));

const FILTERS = {
  all: ["all items", () => true],
  right: ["answered correctly", correct],
  wrong: ["answered wrongly", (item) => !correct(item)],
  flipped: ["answer changed here", flipped],
  kept: ["answer not changed here", (item) => !flipped(item)],
};
const SORTS = {
  file: ["order of the run", null],
  down: ["effect here, largest first", (item) => -Math.abs(valueHere(item))],
  up: ["effect here, smallest first", (item) => Math.abs(valueHere(item))],
  anywhere: ["effect anywhere, largest first", (item) => -largest(item)],
  unsure: ["least certain before", (item) => { const [a, b] = beforeAt(content(), item, here()); return Math.abs(a - b); }],
};

function fillSelect(select, entries, value) {
  select.replaceChildren(...entries.map(([name, text]) => element("option", { value: name, textContent: text })));
  select.value = value;
}

function relist() {
  if (!isRun()) {
    state.listed = (isMaps() ? content().captions : []).map((_, k) => k);
  } else {
    const { key, question } = content().items;
    const text = $("search").value.toLowerCase(), least = Number($("least").value) || 0;
    const keep = FILTERS[$("filter").value][1], order = SORTS[$("sort").value][1];
    const some = valuesOf(content()).length > 0;
    let found = key.map((_, k) => k).filter((k) => keep(k) && (!text || key[k].toLowerCase().includes(text) || question[k].toLowerCase().includes(text)));
    if (least > 0 && some) found = found.filter((k) => Math.abs(valueHere(k)) >= least);
    if (order && (some || $("sort").value === "unsure")) {
      const rank = new Map(found.map((k) => [k, order(k)]));
      found.sort((a, b) => (Number.isNaN(rank.get(a)) ? 1 : Number.isNaN(rank.get(b)) ? -1 : rank.get(a) - rank.get(b)) || a - b);
    }
    state.listed = found;
  }
  state.lists++;
  const total = isRun() ? content().items.key.length : state.listed.length;
  $("count").textContent = isMaps() ? `${total} captions` : `${state.listed.length} of ${total} items`;
  $("rows").style.height = `${state.listed.length * ROW}px`;
  drawRows();
}

function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(state.listed.length, first + Math.ceil(list.clientHeight / ROW) + 9);
  const made = [];
  for (let place = first; place < last; place++) {
    const item = state.listed[place], row = element("div", { className: "row", id: `row-${item}` });
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(item === state.item));
    row.setAttribute("aria-setsize", state.listed.length);
    row.setAttribute("aria-posinset", place + 1);
    row.style.top = `${place * ROW}px`;
    row.onclick = () => choose(item);
    if (isMaps()) {
      row.append(element("span", { className: "text", textContent: content().captions[item] }), element("span", { className: "effect", textContent: shown(content().scores[item], 2) }));
    } else {
      const { picture, question, key } = content().items;
      if (picture[item] >= 0) row.append(element("img", { src: PICTURES[picture[item]], alt: "" }));
      const text = question[item].length > LONG ? key[item] : question[item] || key[item];
      row.append(element("span", { className: "text", textContent: text, title: key[item] }));
      if (valuesOf(content()).length) row.append(element("span", { className: "effect", textContent: shown(valueHere(item), 2) }));
    }
    made.push(row);
  }
  $("rows").replaceChildren(...made);
  if (document.getElementById(`row-${state.item}`)) $("list").setAttribute("aria-activedescendant", `row-${state.item}`);
}

function choose(item) {
  state.item = item;
  const place = state.listed.indexOf(item), list = $("list");
  if (place >= 0) {
    if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
    if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
  }
  if (isMaps()) {
    const { [item]: tokens } = content().tokens, named = tokens.findIndex(([, word, functional]) => !functional && word.length > 2);
    state.word = Math.max(0, named >= 0 ? named : tokens.findIndex((token) => !token[2]));
  }
  drawRows();
  drawItem();
  drawCharts();
}

function step(by) {
  if (!state.listed.length) return;
  const place = state.listed.indexOf(state.item);
  const next = place < 0 ? 0 : Math.min(state.listed.length - 1, Math.max(0, place + by));
  choose(state.listed[next]);
}

// --- the item ---------------------------------------------------------------------------------------------------------

// The labels of the selection: they name the tokens that are edited.
function labels() {
  return content().axes.map(([, entries], k) => entries[state.chosen[k]]);
}

function drawItem() {
  $("item").hidden = content().kind === "ids";
  if (content().kind === "ids") return;
  if (isMaps()) return drawMapItem();
  const { question, key, picture, tokens, vocabulary, edited } = content().items, item = state.item;
  const source = PICTURES[picture[item]];
  $("frame").hidden = source === undefined;
  $("overlay").hidden = true;
  if (source !== undefined) {
    const image = $("picture");
    image.onload = () => image.classList.toggle("small", image.naturalWidth <= 128);
    if (image.getAttribute("src") !== source) image.src = source;
    image.alt = `picture of item ${key[item]}`;
  }
  $("question").textContent = question[item] || key[item];
  const marks = new Set(["", ...labels()].flatMap((label) => edited[item][label] ?? []));
  $("tokens").replaceChildren(...tokens[item].map((index, place) => {
    const chip = element("span", { className: "token", textContent: vocabulary[index].replaceAll("\n", "⏎") });
    if (/^\[\d+ picture tokens\]$/.test(vocabulary[index])) chip.classList.add("picture");
    if (marks.has(place)) { chip.classList.add("edited"); chip.title = "edited"; chip.setAttribute("aria-label", `${vocabulary[index]}, edited`); }
    return chip;
  }));
  drawAnswers();
}

function answerRow(name, logs, words, truth, text) {
  const says = saysFirst(logs) ? 0 : 1, [p, q] = logs.map(Math.exp);
  const bar = element("span", { className: "bar" }, element("span"));
  bar.firstChild.style.width = `${(100 * p) / (p + q || 1)}%`;
  bar.title = `share of ${words[0]}: ${shown((100 * p) / (p + q || 1), 1)} %`;
  const said = element("td", {}, element("span", { className: says === truth ? "said true" : "said", textContent: words[says] }));
  const row = element("tr", {}, element("th", { textContent: name, scope: "row" }), said, element("td", {}, bar),
    element("td", { className: "num", textContent: `p(${words[0]}) = ${shown(p, 4)}` }), element("td", { className: "num", textContent: `p(${words[1]}) = ${shown(q, 4)}` }));
  if (text) row.append(element("td", { textContent: `“${text}”` }));
  return row;
}

function drawAnswers() {
  const run = content(), item = state.item, at = here();
  const words = run.items.wordPairs[run.items.words[item]], truth = run.items.truth[item];
  const texts = run.texts, text = (index) => (texts ? texts.distinct[index] : "");
  const before = beforeAt(run, item, at);
  const table = element("table", {}, answerRow("before", before, words, truth, texts && text(array(texts.before).values[item])));
  if (run.after !== null) {
    const after = afterAt(run, item, at);
    table.append(answerRow("after", after, words, truth, texts && text(array(texts.after).values[item * layout(run).total + at])));
    if (saysFirst(before) !== saysFirst(after)) table.lastChild.append(element("td", { className: "flip", textContent: "changed" }));
  }
  $("answers").replaceChildren(table);
}

function drawMapItem() {
  const { captions, tokens, scores, cosines, picture } = content(), caption = state.item;
  $("frame").hidden = false;
  $("overlay").hidden = false;
  $("picture").classList.remove("small");
  if ($("picture").getAttribute("src") !== PICTURES[picture]) $("picture").src = PICTURES[picture];
  $("picture").alt = "the picture of all captions";
  $("question").textContent = captions[caption];
  $("tokens").replaceChildren(...tokens[caption].map(([, word, functional], place) => {
    const chip = element("button", { className: "token", textContent: word, disabled: functional, title: functional ? "a functional word: its column is a fixed vector" : "show this word's map" });
    chip.classList.toggle("edited", place === state.word);
    chip.setAttribute("aria-pressed", String(place === state.word));
    chip.onclick = () => { state.word = place; drawItem(); drawCharts(); };
    return chip;
  }));
  const best = Math.max(...scores);
  $("answers").replaceChildren(element("p", { textContent: `score ${shown(scores[caption])}${scores[caption] === best ? " (the highest)" : ""} · pooled cosine ${shown(cosines[caption])}` }));
  const { side, values, low, high } = wordMap();
  overlay($("overlay"), values, side, low, high);
}

// The map of the chosen word, row by row; the ends of the colours are those of all maps of all words.
function wordMap() {
  const { shape: [, side, , columns], values } = array(content().maps);
  const [column, word] = content().tokens[state.item][state.word];
  content().ends ??= [...values].reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const start = state.item * side * side;
  const found = Array.from({ length: side * side }, (_, k) => values[(start + k) * columns + column]);
  return { side, word, values: found, low: content().ends[0], high: content().ends[1] };
}

// --- charts -----------------------------------------------------------------------------------------------------------

// Rows of the heat map: every combination of entries of the axes other than its columns.
function heatRows(run) {
  if (!run.heatRows) {
    const { sizes, strides, names, column } = layout(run);
    const others = names.map((_, k) => k).filter((k) => k !== column);
    let rows = [{ start: 0, entries: {}, label: [] }];
    for (const k of others) rows = rows.flatMap((row) => run.axes[k][1].map((label, entry) => ({ start: row.start + entry * strides[k], entries: { ...row.entries, [k]: entry }, label: [...row.label, label] })));
    const cells = names.includes("x") && names.includes("y");
    run.heatRows = { others, rows, stride: strides[column], columns: sizes[column], title: others.map((k) => names[k]).join(cells ? "," : " · ") };
  }
  return run.heatRows;
}

function means(run) {
  const { total } = layout(run), found = numbers(run, state.value), sums = new Float64Array(total), counts = new Float64Array(total);
  for (const item of state.listed)
    for (let at = 0; at < total; at++) { const value = found[item * total + at]; if (Number.isFinite(value)) { sums[at] += value; counts[at]++; } }
  return sums.map((sum, at) => (counts[at] ? sum / counts[at] : NaN));
}

function chartValues() {
  const run = content(), { total } = layout(run);
  return state.over === "mean" ? means(run) : numbers(run, state.value).subarray(state.item * total, (state.item + 1) * total);
}

function select(changes) {
  for (const [axis, entry] of Object.entries(changes)) state.chosen[axis] = entry;
  syncControls();
  if (["down", "up", "unsure"].includes($("sort").value) || ["flipped", "kept"].includes($("filter").value) || Number($("least").value) > 0) relist();
  else drawRows();
  drawItem();
  drawCharts();
}

function drawCharts() {
  $("heatBox").hidden = content().kind === "ids" || (isRun() && !valuesOf(content()).length);
  // All boxes first: their number decides how wide each is, and charts are as wide as their boxes.
  $("cellsBox").hidden = !(isRun() && valuesOf(content()).length && ["x", "y", "layer"].every((name) => layout(content()).names.includes(name)));
  $("planeBox").hidden = !planeOf();
  const tables = [];
  if (isMaps()) {
    const { captions, scores, cosines } = content();
    $("heatCaption").textContent = "Score of the dense map and pooled cosine, by caption";
    bars("heat", captions, [{ name: "score", values: scores, colour: css("--bar") }, { name: "cosine", values: cosines, colour: css("--other") }], state.item, choose);
    tables.push({ caption: "Scores by caption", columns: ["score", "cosine"], rows: captions, z: captions.map((_, k) => [scores[k], cosines[k]]) });
    const { side, word, values } = wordMap(), places = Array.from({ length: side }, (_, k) => String(k));
    tables.push({ caption: `Cosine of patches and “${word}”, row by row`, columns: places, rows: places, z: places.map((_, y) => values.slice(y * side, (y + 1) * side)) });
  } else if (isRun() && valuesOf(content()).length) {
    tables.push(...drawHeat());
  }
  if (planeOf()) tables.push(drawPlane());
  if (!$("tableBox").hidden) drawTables(tables);
}

function drawHeat() {
  const run = content(), values = chartValues(), { names, column, strides } = layout(run), { rows, stride, columns, others, title } = heatRows(run);
  const value = valuesOf(run)[state.value], of = state.over === "mean" ? `mean of ${state.listed.length} items` : "this item";
  const z = rows.map((row) => Array.from({ length: columns }, (_, k) => values[row.start + k * stride]));
  const labels = rows.map((row) => row.label.join(title.includes(",") ? "," : " · "));
  const own = rows.findIndex((row) => others.every((k) => row.entries[k] === state.chosen[k]));
  const xTitle = names[column], x = run.axes[column][1];
  const version = [state.content, state.value, state.over, state.over === "mean" ? state.lists : state.item].join();
  $("heatCaption").textContent = `${value.name}, by ${xTitle}${title ? ` and ${title}` : ""}; ${of}`;
  heatmap("heat", {
    version, z, x, y: labels, xTitle, yTitle: title, name: value.name, unit: value.unit, signed: value.signed, selected: [state.chosen[column], own],
    onClick: (k, row) => select({ [column]: k, ...rows[row].entries }),
  });
  const tables = [{ caption: $("heatCaption").textContent, columns: x.map((label) => `${xTitle} ${label}`), rows: labels, z }];
  if (!$("cellsBox").hidden) {
    const [ax, ay] = [names.indexOf("x"), names.indexOf("y")];
    const base = here() - state.chosen[ax] * strides[ax] - state.chosen[ay] * strides[ay];
    const cells = run.axes[ay][1].map((_, y) => run.axes[ax][1].map((_, k) => values[base + k * strides[ax] + y * strides[ay]]));
    $("cellsCaption").textContent = `The same by cell, layer ${x[state.chosen[column]]}`;
    heatmap("cells", {
      version: `${version},${base}`, z: cells, x: run.axes[ax][1], y: run.axes[ay][1], xTitle: "column", yTitle: "row", name: value.name, unit: value.unit, signed: value.signed, square: true,
      range: range(z, value.signed), selected: [state.chosen[ax], state.chosen[ay]], onClick: (k, row) => select({ [ax]: k, [ay]: row }),
    });
    tables.push({ caption: $("cellsCaption").textContent, columns: run.axes[ax][1].map((k) => `column ${k}`), rows: run.axes[ay][1].map((k) => `row ${k}`), z: cells });
  }
  return tables;
}

// The index of the selected layer among those of the IDs.
function planeLayer() {
  const plane = planeOf();
  if (!isRun()) return state.chosen[0];
  const { names } = layout(content()), axis = names.indexOf("layer");
  return axis < 0 ? 0 : Math.max(0, plane.layers.indexOf(content().axes[axis][1][state.chosen[axis]]));
}

function drawPlane() {
  const plane = planeOf(), layer = planeLayer(), { shape: [, groups, places], values } = array(plane.points);
  $("planeCaption").textContent = `IDs of ${plane.groups[state.group]} after layer ${plane.layers[layer]}`;
  planePlot("plane", plane, layer, state.group);
  const z = plane.labels.map((_, p) => [0, 1].map((c) => values[((layer * groups + state.group) * places + p) * 2 + c]));
  return { caption: $("planeCaption").textContent, columns: plane.axes, rows: plane.labels, z };
}

function drawTables(tables) {
  $("tableBox").replaceChildren(...tables.map(({ caption, columns, rows, z }) => element("table", {}, element("caption", { textContent: caption }),
    element("thead", {}, element("tr", {}, element("td"), ...columns.map((name) => element("th", { textContent: name, scope: "col" })))),
    element("tbody", {}, ...rows.map((name, y) => element("tr", {}, element("th", { textContent: name, scope: "row" }), ...z[y].map((value) => element("td", { textContent: shown(value) }))))))));
}

// --- controls ---------------------------------------------------------------------------------------------------------

function syncControls() {
  content().axes?.forEach(([name, entries], k) => {
    if (name === "layer") { $("layer").value = state.chosen[k]; $("layerName").textContent = entries[state.chosen[k]]; }
    else $(`axis-${k}`).value = state.chosen[k];
  });
  if (content().kind === "ids") { $("layer").value = state.chosen[0]; $("layerName").textContent = planeOf().layers[state.chosen[0]]; }
}

function open(index) {
  Object.assign(state, { content: index, item: 0, value: 0, group: 0, word: 0 });
  $("content").value = index;
  $("about").replaceChildren(...content().about.map(([name, text]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: text }))));
  $("sidebar").hidden = content().kind === "ids";
  document.querySelector(".tools").hidden = !isRun();
  const axes = content().kind === "ids" ? [["layer", planeOf().layers]] : content().axes ?? [];
  state.chosen = axes.map(([, entries]) => (entries.length > 1 ? Math.floor((entries.length - 1) / 2) : 0));
  axes.forEach(([name], k) => { if (name !== "layer") state.chosen[k] = 0; });
  const slider = axes.find(([name]) => name === "layer");
  $("layerBox").hidden = !slider;
  $("layer").max = slider ? slider[1].length - 1 : 0;
  $("selects").replaceChildren(...axes.flatMap(([name, entries], k) => {
    if (name === "layer") return [];
    const box = element("select", { id: `axis-${k}` });
    fillSelect(box, entries.map((entry, place) => [String(place), entry]), "0");
    box.onchange = () => select({ [k]: Number(box.value) });
    return [element("label", {}, `${name} `, box)];
  }));
  const values = isRun() ? valuesOf(content()) : [];
  $("valueBox").hidden = $("overBox").hidden = !values.length;
  fillSelect($("value"), values.map((value, k) => [String(k), value.name]), "0");
  if (isRun()) {
    const known = content().items.truth.some((one) => one >= 0), edits = content().after !== null;
    const filters = Object.entries(FILTERS).filter(([name]) => (known || !["right", "wrong"].includes(name)) && (edits || !["flipped", "kept"].includes(name)));
    fillSelect($("filter"), filters.map(([name, [text]]) => [name, text]), "all");
    fillSelect($("sort"), Object.entries(SORTS).map(([name, [text]]) => [name, text]), "file");
    $("search").value = "";
    $("least").value = 0;
  }
  if (planeOf()) fillSelect($("group"), planeOf().groups.map((name, k) => [String(k), name]), "0");
  $("controls").hidden = isMaps();
  relist();
  if (isMaps()) state.item = content().scores.indexOf(Math.max(...content().scores));
  syncControls();
  state.listed.length || !isRun() ? choose(isMaps() ? state.item : state.listed[0] ?? 0) : drawCharts();
}

function theme(next) {
  const order = ["auto", "light", "dark"];
  state.theme = next ?? order[(order.indexOf(state.theme) + 1) % 3];
  const dark = state.theme === "dark" || (state.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = `Theme: ${state.theme}`;
}

function toggle(button, box, attribute) {
  $(box).hidden = !$(box).hidden;
  $(button).setAttribute(attribute, String(!$(box).hidden));
}

function moveLayer(by) {
  const next = Number($("layer").value) + by;
  if (!$("layerBox").hidden && next >= 0 && next <= Number($("layer").max)) chooseLayer(next);
}

function chooseLayer(entry) {
  select({ [content().kind === "ids" ? 0 : layout(content()).names.indexOf("layer")]: entry });
}

function moveRow(by) {
  if (isMaps()) {
    const tokens = content().tokens[state.item], count = tokens.length;
    let next = state.word;
    do next = (next + by + count) % count; while (tokens[next][2] && next !== state.word);
    state.word = next;
    drawItem();
    return drawCharts();
  }
  if (!isRun()) return;
  const { rows, others } = heatRows(content());
  const own = rows.findIndex((row) => others.every((k) => row.entries[k] === state.chosen[k]));
  select(rows[Math.min(rows.length - 1, Math.max(0, own + by))].entries);
}

const KEYS = {
  j: () => step(1), k: () => step(-1), l: () => moveLayer(1), h: () => moveLayer(-1), r: () => moveRow(1), e: () => moveRow(-1),
  m: () => { if (isRun()) { state.over = $("over").value = state.over === "mean" ? "item" : "mean"; drawCharts(); } },
  "/": () => $("search").focus(), t: () => $("tables").click(), d: () => $("theme").click(), "?": () => $("help").click(),
};

function listen() {
  $("content").onchange = () => open(Number($("content").value));
  $("layer").oninput = () => chooseLayer(Number($("layer").value));
  $("value").onchange = () => { state.value = Number($("value").value); relist(); drawCharts(); };
  $("over").onchange = () => { state.over = $("over").value; drawCharts(); };
  $("group").onchange = () => { state.group = Number($("group").value); drawCharts(); };
  for (const id of ["search", "least"]) $(id).oninput = () => { relist(); if (state.over === "mean") drawCharts(); };
  for (const id of ["filter", "sort"]) $(id).onchange = () => { relist(); if (state.over === "mean") drawCharts(); };
  $("list").onscroll = drawRows;
  window.onresize = () => { drawRows(); drawCharts(); };
  $("tables").onclick = () => { toggle("tables", "tableBox", "aria-pressed"); drawCharts(); };
  $("help").onclick = () => toggle("help", "keys", "aria-expanded");
  $("theme").onclick = () => { theme(); drawCharts(); };
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { if (state.theme === "auto") { theme("auto"); drawCharts(); } };
  $("list").onkeydown = (event) => {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in moves) { event.preventDefault(); step(Math.max(-1e9, Math.min(1e9, moves[event.key]))); }
  };
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
  };
  const tip = $("hover");
  $("overlay").onmousemove = (event) => {
    const { side, values } = wordMap(), box = $("overlay").getBoundingClientRect();
    const place = (at, start, length) => Math.min(side - 1, Math.max(0, Math.floor(((at - start) / length) * side)));
    const x = place(event.clientX, box.left, box.width), y = place(event.clientY, box.top, box.height);
    tip.textContent = `column ${x}, row ${y}: ${shown(values[y * side + x])}`;
    Object.assign(tip.style, { left: `${event.clientX + 12}px`, top: `${event.clientY + 12}px` });
    tip.hidden = false;
  };
  $("overlay").onmouseleave = () => { tip.hidden = true; };
}

async function begin() {
  await unpack();
  theme("auto");
  fillSelect($("content"), MANIFEST.contents.map((one, k) => [String(k), one.title]), "0");
  listen();
  open(0);
  document.documentElement.dataset.ready = "true";
}
begin();
