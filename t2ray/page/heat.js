// The heat map of an expert: mean |z - 1| by layer (rows, the first layer on top) and kind of matrix (columns), as
// `GET /v1/experts/NAME` gives it. Drawn when an expert is opened.

import { el, figure, svg } from "./dom.js";

/** "q_proj" as "q": the columns are narrow, and the full name is in each cell's title. */
const short = (kind) => kind.replace(/_proj$/, "").replaceAll("_", " ");

/** What pictures go through before the decoder has the number -1. */
const named = (layer) => (layer < 0 ? "tower" : `layer ${layer}`);

export function heatMap({ layers, kinds, values }, name) {
  const largest = Math.max(...values.flat(), 0);
  const cell = { width: 40, height: Math.max(4, Math.min(18, 320 / layers.length)) }; // 4 layers, or 80, in one view
  const every = Math.ceil(layers.length / 16);
  const [left, top] = [layers[0] < 0 ? 40 : 26, 16];
  const width = left + kinds.length * cell.width;
  const height = top + layers.length * cell.height;
  const cells = layers.flatMap((layer, row) =>
    kinds.map((kind, column) =>
      svg(
        "rect",
        {
          x: left + column * cell.width + 0.75,
          y: top + row * cell.height + 0.75,
          width: cell.width - 1.5,
          height: cell.height - 1.5,
          rx: 2,
          "fill-opacity": (0.06 + 0.94 * (largest ? values[row][column] / largest : 0)).toFixed(3),
        },
        svg("title", {}, `${named(layer)}, ${kind}: ${figure(values[row][column])}`),
      ),
    ),
  );
  const rows = layers.map((layer, row) => {
    const place = { x: left - 6, y: top + (row + 0.5) * cell.height, class: "row-name" };
    return row % every ? null : svg("text", place, layer < 0 ? named(layer) : String(layer));
  });
  const columns = kinds.map((kind, column) =>
    svg("text", { x: left + (column + 0.5) * cell.width, y: top - 5, class: "column-name" }, short(kind)),
  );
  const ramp = el("span", { class: "ramp", "aria-hidden": "true" });
  const label = `${name}: mean |z − 1| by layer and matrix. ${strongest({ layers, kinds, values })}`;
  return el(
    "figure",
    { class: "heat" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...columns, ...rows, ...cells),
    el(
      "figcaption",
      {},
      el("span", {}, "mean |z − 1| by layer and matrix"),
      el("span", { class: "scale" }, "0 ", ramp, ` ${figure(largest, 2)}`),
    ),
  );
}

function strongest({ layers, kinds, values }) {
  let best = [0, 0];
  values.forEach((row, r) => row.forEach((value, c) => (value > values[best[0]][best[1]] ? (best = [r, c]) : null)));
  const value = values[best[0]]?.[best[1]];
  return value === undefined ? "" : `Largest: ${figure(value, 2)} in ${named(layers[best[0]])}, ${kinds[best[1]]}.`;
}
