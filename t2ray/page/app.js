// Starts the page and joins its parts: the header, the composer, the sampling controls, the keyboard. The parts know
// nothing of each other.

import { askKey, getJson, hasKey } from "./api.js";
import { createChat } from "./chat.js";
import { announce, byId } from "./dom.js";
import { createExperts } from "./experts.js";
import { watchLoad } from "./load.js";
import { createStrategy } from "./strategy.js";

const CATALOG_MS = 10_000; // experts come and go while the page is open
const WHENCE = "Whoever runs the server can give you one.";
const THEMES = { auto: "as the system", light: "light", dark: "dark" };

const question = byId("question");
const chat = createChat({ settings, onBusy: showBusy });
const experts = createExperts({ onMix: () => strategy.byHand() });
const strategy = createStrategy({
  mixture: experts.mixture,
  onChange: (model) => (byId("model-in-use").textContent = model),
});
let state = "connecting";
let catalogAt = -Infinity; // performance.now() of the catalog on the page
const load = watchLoad({ onState: showState });

/** What the next request is made with. */
function settings() {
  const seed = byId("seed");
  return {
    model: strategy.model(),
    temperature: byId("temperature").valueAsNumber,
    maxTokens: byId("max-tokens").valueAsNumber,
    seed: seed.value === "" ? undefined : seed.valueAsNumber,
    memory: byId("memory").checked,
  };
}

// ------------------------------------------------------------------------------------------------ server and catalog

const STATES = { online: "online", offline: "offline, trying again", locked: "key needed" };

async function showState(next, message = "") {
  const changed = next !== state;
  state = next;
  if (changed) {
    byId("status").dataset.state = next;
    byId("status-text").textContent = STATES[next];
    const banner = byId("banner");
    banner.hidden = next !== "offline";
    banner.textContent = next === "offline" ? `${message} The page tries again every 2 seconds.` : "";
    byId("key").hidden = next !== "locked" && !hasKey();
  }
  if (next === "online" && (changed || performance.now() - catalogAt > CATALOG_MS)) await loadCatalog();
  if (next === "locked" && changed) unlock(hasKey() ? `The key was refused: ${message}` : WHENCE);
}

async function unlock(reason) {
  if (await askKey(reason)) state = "connecting"; // so that a second wrong key is asked about too
  byId("key").hidden = state !== "locked" && !hasKey();
  load.now();
}

async function loadCatalog() {
  catalogAt = performance.now();
  try {
    const [models, found] = await Promise.all([getJson("v1/models"), getJson("v1/experts")]);
    experts.show(found.data);
    strategy.show(models.data);
    const base = models.data.find((model) => model.t2ray?.kind === "base");
    byId("base").textContent = base?.t2ray.base ?? "";
  } catch (error) {
    showState(error.status === 401 ? "locked" : "offline", error.message);
  }
}

byId("key").addEventListener("click", () => unlock(hasKey() ? "Another key replaces the one in use." : WHENCE));

// -------------------------------------------------------------------------------------------------------- composer

function showBusy(busy) {
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  // the button that was pressed has gone, and the keyboard's place with it
  if ([document.body, byId("send"), byId("stop")].includes(document.activeElement)) question.focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (text && chat.send(text)) question.value = "";
  question.focus();
});

question.addEventListener("keydown", (event) => {
  // an input method's Enter chooses a word
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.isBusy() && !byId("key-dialog").open) chat.stop();
});

byId("stop").addEventListener("click", () => {
  chat.stop();
  question.focus();
});

byId("fresh").addEventListener("click", () => {
  chat.clear();
  showPanel(false);
  question.focus();
});

for (const button of document.querySelectorAll(".examples button")) {
  button.addEventListener("click", () => chat.send(button.textContent) && question.focus());
}

// ------------------------------------------------------------------------------------------------- header and panel

for (const field of [byId("max-tokens"), byId("seed")]) {
  // no request is made with what is no whole number: the first value comes back
  field.addEventListener("change", () => field.checkValidity() || (field.value = field.defaultValue));
}

byId("temperature").addEventListener("input", ({ target }) => {
  byId("temperature-value").textContent = target.value;
  target.style.setProperty("--at", target.valueAsNumber / Number(target.max));
});

function showPanel(wanted) {
  document.body.dataset.view = wanted ? "panel" : "chat";
  byId("panel-toggle").setAttribute("aria-expanded", String(wanted));
  byId("panel-toggle").textContent = wanted ? "Chat" : "Experts";
}

byId("panel-toggle").addEventListener("click", () => showPanel(document.body.dataset.view !== "panel"));

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  byId("theme-text").textContent = theme[0].toUpperCase() + theme.slice(1);
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
  return theme;
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(showTheme()) + 1) % names.length];
  if (next === "auto") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("t2ray-theme");
  } else {
    document.documentElement.dataset.theme = next;
    localStorage.setItem("t2ray-theme", next);
  }
  showTheme();
  announce(`Colours: ${THEMES[next]}`);
});

showPanel(false);
showTheme();
question.focus();
