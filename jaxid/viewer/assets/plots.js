// Charts, drawn by Plotly in the colours of the theme.

const DIVERGING = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]];
const SEQUENTIAL = [[0, "#0d0887"], [0.25, "#7e03a8"], [0.5, "#cc4778"], [0.75, "#f89540"], [1, "#f0f921"]];
const CONFIG = { displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function styled(layout) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 },
    margin: { l: 10, r: 10, t: 8, b: 10 }, hoverlabel: { font: { size: 13 } }, showlegend: false, ...layout,
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  };
}

const clicks = new Map();
function draw(id, data, layout, onClick) {
  const box = document.getElementById(id);
  Plotly.react(box, data, styled({ width: box.clientWidth, ...layout }), CONFIG);
  if (!clicks.has(id)) box.on("plotly_click", (event) => clicks.get(id)?.(event.points[0]));
  clicks.set(id, onClick);
}

// The ends of the colours: symmetric about zero for signed values.
function range(matrix, signed) {
  let low = Infinity, high = -Infinity;
  for (const row of matrix) for (const value of row) if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) [low, high] = [0, 1];
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return signed ? [-most, most] : [Math.min(0, low), Math.max(high, low + 1e-6)];
}

// Spec: version of the numbers, z, x and y labels, titles, value name and unit, signed, the selected [column, row], square, onClick(column, row).
function heatmap(id, spec) {
  const [zmin, zmax] = spec.range ?? range(spec.z, spec.signed);
  const [column, row] = spec.selected;
  const columns = spec.x.map((_, k) => k), rows = spec.y.map((_, k) => k);
  const tick = (labels) => {
    const step = Math.ceil(labels.length / 24), kept = labels.map((_, k) => k).filter((k) => k % step === 0);
    return { tickvals: kept, ticktext: kept.map((k) => labels[k]) };
  };
  const text = spec.z.map((values, y) => values.map((value, x) => `${spec.xTitle} ${spec.x[x]}<br>${spec.yTitle} ${spec.y[y]}<br><b>${shown(value)}</b> ${spec.unit}`));
  const data = [{
    type: "heatmap", z: spec.z, x: columns, y: rows, text, hovertemplate: "%{text}<extra></extra>", zmin, zmax,
    colorscale: spec.signed ? DIVERGING : SEQUENTIAL, colorbar: { thickness: 12, outlinewidth: 0, tickfont: { size: 11 } }, hoverongaps: true, xgap: 1, ygap: 1,
  }];
  const height = spec.square ? 300 : Math.max(190, Math.min(560, 90 + 22 * rows.length));
  const shapes = [{ type: "rect", x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5, line: { color: css("--ink"), width: 3 } }];
  const box = document.getElementById(id), drawn = [spec.version, box.clientWidth, css("--ink")].join();
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `Heat map of ${spec.name}: at ${spec.xTitle} ${spec.x[column]}, ${spec.yTitle} ${spec.y[row]}: ${shown(spec.z[row][column])} ${spec.unit}`);
  if (box.dataset.drawn === drawn) return Plotly.relayout(box, { shapes }); // another cell of the same numbers
  box.dataset.drawn = drawn;
  draw(id, data, {
    height, shapes,
    xaxis: { title: { text: spec.xTitle, standoff: 6 }, ...tick(spec.x), showgrid: false, zeroline: false, range: [-0.5, columns.length - 0.5] },
    yaxis: { title: { text: spec.yTitle, standoff: 6 }, ...tick(spec.y), showgrid: false, zeroline: false, range: [rows.length - 0.5, -0.5] },
  }, (point) => spec.onClick(point.x, point.y));
}

// IDs of one group at one layer; the frame is the same at all layers of the group, so that sizes can be compared.
function planePlot(id, plane, layer, group) {
  // Choosing an item changes nothing here.
  const box = document.getElementById(id), drawn = [plane.points, layer, group, box.clientWidth, css("--ink")].join();
  if (box.dataset.drawn === drawn) return;
  box.dataset.drawn = drawn;
  const { shape, values } = array(plane.points);
  const [, groups, places] = shape;
  const point = (l, p, c) => values[((l * groups + group) * places + p) * 2 + c];
  const at = (c) => plane.labels.map((_, p) => point(layer, p, c));
  const x = at(0), y = at(1), flatLine = plane.lines.length === 1;
  const along = (values) => plane.lines.flatMap((line) => [...line.map((p) => values[p]), null]);
  const data = [{ type: "scatter", mode: "lines", x: along(x), y: along(y), line: { color: css("--soft"), width: 1.2 }, hoverinfo: "skip" }];
  data.push({
    type: "scatter", mode: "markers+text", x, y, text: plane.labels, textposition: "top center", textfont: { size: 11 },
    marker: { size: 11, color: plane.labels.map((_, p) => p), colorscale: SEQUENTIAL, line: { color: css("--ground"), width: 1 } },
    hovertemplate: `%{text}<br>${plane.axes[0]} <b>%{x:.3f}</b><br>${plane.axes[1]} <b>%{y:.3f}</b><extra></extra>`,
  });
  const known = x.concat(flatLine ? [] : y).filter(Number.isFinite).map(Math.abs);
  const most = 1.25 * Math.max(1e-6, ...known);
  draw(id, data, {
    height: 400,
    xaxis: { title: { text: plane.axes[0] }, range: flatLine ? undefined : [-most, most] },
    // The second coordinate of the plane points down, as rows of a picture do.
    yaxis: { title: { text: plane.axes[1] }, ...(flatLine ? {} : { range: [most, -most], scaleanchor: "x" }) },
  }, () => {});
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `IDs of ${plane.groups[group]} after layer ${plane.layers[layer]}; the table view has the numbers`);
}

function bars(id, labels, series, selected, onClick) {
  const data = series.map(({ name, values, colour }) => ({
    type: "bar", orientation: "h", name, x: values, y: labels.map((_, k) => k), marker: { color: colour, opacity: labels.map((_, k) => (k === selected ? 1 : 0.55)) },
    hovertemplate: `${name} <b>%{x:.3f}</b><extra></extra>`,
  }));
  document.getElementById(id).dataset.drawn = "";
  const wrapped = labels.map((label) => (label.length > 42 ? `${label.slice(0, 40)}…` : label));
  draw(id, data, {
    height: 110 + 44 * labels.length, barmode: "group", showlegend: true, legend: { orientation: "h", y: -0.18 },
    yaxis: { tickvals: labels.map((_, k) => k), ticktext: wrapped, autorange: "reversed", showgrid: false },
  }, (point) => onClick(Math.round(point.y)));
}

const CHANNELS = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
function colour(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (SEQUENTIAL.length - 1), k = Math.floor(place);
  const [from, to] = [CHANNELS(SEQUENTIAL[k][1]), CHANNELS(SEQUENTIAL[k + 1][1])];
  return from.map((one, c) => Math.round(one + (place - k) * (to[c] - one)));
}

// A map over the picture: one translucent square a patch.
function overlay(canvas, values, side, low, high) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d"), image = context.createImageData(side, side);
  values.forEach((value, k) => image.data.set([...colour((value - low) / (high - low || 1)), 165], 4 * k));
  context.putImageData(image, 0, 0);
}
