// The endpoint's load, asked for every two seconds while the page is in view, and from it whether the server is there.
// A poll never opens the key's dialog.

import { getJson } from "./api.js";
import { byId, el, figure } from "./dom.js";

const EVERY_MS = 2000;
const KEPT = 60; // points of the line: two minutes

/** `onState("online" | "offline" | "locked", message)` after every poll. The result's `now()` polls at once. */
export function watchLoad({ onState }) {
  const rates = [];
  let timer = null;

  async function poll() {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        draw(await getJson("v1/load", { ask: false, signal: AbortSignal.timeout(4 * EVERY_MS) }));
        onState("online");
      } catch (error) {
        byId("load").dataset.stale = "true";
        onState(error.status === 401 ? "locked" : "offline", error.message);
      }
    }
    timer = setTimeout(poll, EVERY_MS);
  }

  function draw({ replicas, running, waiting, tokens_per_s: rate, requests, kv_used: kv }) {
    rates.push(rate);
    if (rates.length > KEPT) rates.shift();
    const most = Math.max(...rates, 1);
    const points = rates.map((value, i) => {
      const x = ((KEPT - rates.length + i) / (KEPT - 1)) * 120; // the newest stands at the right, in a box of 120 by 32
      return `${x.toFixed(1)},${(30 - (28 * value) / most).toFixed(1)}`;
    });
    byId("load-line").firstElementChild.setAttribute("points", points.join(" "));
    byId("load-rate").textContent = figure(rate);
    byId("load").dataset.stale = "false";
    const rows = [
      ["Requests", figure(requests)],
      ["Running", figure(running)],
      ["Waiting", figure(waiting)],
      ["Replicas", figure(replicas)],
      ["KV cache", `${figure(100 * kv, 2)} %`],
    ];
    byId("load-figures").replaceChildren(
      ...rows.map(([name, value]) => el("div", { "data-figure": name }, el("dt", {}, name), el("dd", {}, value))),
    );
  }

  document.addEventListener("visibilitychange", () => document.hidden || poll());
  poll();
  return { now: poll };
}
