// Starts the page and joins its parts: the header, the composer, the sampling controls, the keyboard. The parts know
// nothing of each other.

import { askKey, getJson, hasKey } from "./api.js";
import { createChat } from "./chat.js";
import { showCode } from "./code.js";
import { announce, byId, el } from "./dom.js";
import { examples } from "./examples.js";
import { createExperts } from "./experts.js";
import { watchLoad } from "./load.js";
import { createPictures } from "./pictures.js";
import { createSampling } from "./sampling.js";
import { createStrategy } from "./strategy.js";

const CATALOG_MS = 10_000; // experts come and go while the page is open
const WHENCE = "Whoever runs the server can give you one.";
const THEMES = { auto: "as the system", light: "light", dark: "dark" };

const question = byId("question");
const sampling = createSampling({ onWrong: () => showPanel(true) });
const pictures = createPictures();
const chat = createChat({ settings, onBusy: showBusy });
const experts = createExperts({ onMix: () => strategy.byHand() });
const strategy = createStrategy({
  mixture: experts.mixture,
  onChange: (model) => (byId("model-in-use").textContent = model),
});
let state = "connecting";
let catalogAt = -Infinity; // performance.now() of the catalog on the page
const load = watchLoad({ onState: showState });

/** What the next request is made with, or null where a number is none: its field says so and has the focus. */
function settings() {
  const values = sampling.values();
  return values && { model: strategy.model(), ...values };
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
    showExamples(examples(base?.t2ray.base ?? "", found.data));
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
  if (!text || !chat.send(text, pictures.urls())) return;
  pictures.clear();
  question.value = "";
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
  if (event.key === "Escape" && chat.isBusy() && !document.querySelector("dialog[open]")) chat.stop();
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

function showExamples(texts) {
  const pick = ({ currentTarget }) => chat.send(currentTarget.textContent) && question.focus();
  const button = (text) => el("button", { type: "button", on: { click: pick } }, text);
  byId("examples").replaceChildren(...texts.map((text) => el("li", {}, button(text))));
}

byId("code").addEventListener("click", () => {
  const asked = settings();
  if (asked) showCode(asked, question.value.trim() || chat.lastQuestion() || byId("examples").textContent);
});

// ------------------------------------------------------------------------------------------------- header and panel

function showPanel(wanted) {
  document.body.dataset.view = wanted ? "panel" : "chat";
  byId("panel-toggle").setAttribute("aria-expanded", String(wanted));
  byId("panel-toggle").textContent = wanted ? "Chat" : "Experts";
}

byId("panel-toggle").addEventListener("click", () => showPanel(document.body.dataset.view !== "panel"));

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  byId("theme-text").textContent = theme === "auto" ? "System" : theme[0].toUpperCase() + theme.slice(1);
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
