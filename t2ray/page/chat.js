// The conversation: questions, the answers to each, and what of them is sent along with the next question. One answer
// streams at a time. Not here: how an answer looks (answer.js) and which model is asked (`settings`, from app.js).

import { createAnswer } from "./answer.js";
import { chatStream } from "./api.js";
import { announce, byId, el } from "./dom.js";
import { keep, kept } from "./kept.js";
import { content, shown } from "./pictures.js";

const LARGEST_SEED = 2 ** 31;

/**
 * `settings()`: `{ model, temperature, maxTokens, seed, memory }`, or null where they cannot be used as they stand;
 * `onBusy(busy)` follows the stream.
 */
export function createChat({ settings, onBusy }) {
  const thread = byId("thread");
  let turns = []; // { question, pictures, answers, node }
  let running = null; // the AbortController of the answer that streams
  let left = false; // whether the page is being left, which breaks a stream off

  for (const { question, pictures = [], answers } of kept("turns") ?? []) {
    const turn = addTurn(question, pictures);
    for (const saved of answers) addAnswer(turn, createAnswer(saved.asked, () => ask(turn), saved));
  }
  follow(true);
  addEventListener("pageshow", () => (left = false));
  addEventListener("pagehide", () => {
    save(); // with what has come of an answer that still streams
    left = true;
  });

  function save() {
    if (!left) keep("turns", turns.map(({ question, pictures, answers }) => ({ question, pictures, answers: answers.map(({ record }) => record) })));
  }

  /** Whether a question can be asked now; else it stays where it was typed. */
  function ready() {
    if (running) announce("An answer is still being written. Press Escape to stop it.");
    return !running && settings() !== null;
  }

  /** Asks; false when that cannot be now. */
  function send(question, pictures = []) {
    if (!ready()) return false;
    ask(addTurn(question, pictures));
    return true;
  }

  function addTurn(question, pictures) {
    const turn = { question, pictures, answers: [], node: el("div", { class: "turn" }) };
    showQuestion(turn);
    turns.push(turn);
    byId("welcome").hidden = true;
    thread.append(turn.node);
    return turn;
  }

  function addAnswer(turn, answer) {
    for (const failed of turn.answers.filter(({ record }) => record.state === "failed")) failed.node.remove();
    turn.answers = [...turn.answers.filter(({ record }) => record.state !== "failed"), answer];
    turn.node.append(answer.node);
  }

  async function ask(turn) {
    if (!ready()) return;
    const { model, temperature, maxTokens, memory, seed = Math.floor(Math.random() * LARGEST_SEED) } = settings();
    const answer = createAnswer({ model, seed, temperature, maxTokens }, () => ask(turn));
    addAnswer(turn, answer);
    follow(true);
    const control = new AbortController();
    running = control;
    onBusy(true);
    const messages = [...(memory ? history(turn) : []), { role: "user", content: content(turn.question, turn.pictures) }];
    const sampling = { temperature, seed, ...(maxTokens ? { max_tokens: maxTokens } : {}) };
    const body = { model, messages, ...sampling, stream: true, stream_options: { include_usage: true } };
    try {
      for await (const chunk of chatStream(body, control.signal, (id) => (answer.record.requestId = id))) {
        const atEnd = isAtEnd();
        answer.take(chunk);
        follow(atEnd);
      }
      answer.finish();
    } catch (error) {
      if (control.signal.aborted) answer.stop();
      else answer.fail(error);
    } finally {
      if (running === control) {
        running = null;
        onBusy(false);
      }
      save();
      follow(isAtEnd(200)); // what is written at the end, such as an error, is taller than a line
    }
  }

  /** The turns before this one that have an answer: of several answers, the last. */
  function history(turn) {
    return turns.slice(0, turns.indexOf(turn)).flatMap(({ question, pictures, answers }) => {
      const records = answers.map(({ record }) => record);
      const good = records.filter(({ state, text }) => (state === "done" || state === "stopped") && text).at(-1);
      return good ? [{ role: "user", content: content(question, pictures) }, { role: "assistant", content: good.text }] : [];
    });
  }

  // ------------------------------------------------------------------------------------------------- a turn's question

  function showQuestion(turn) {
    const edit = el("button", { type: "button", class: "quiet edit", on: { click: () => editQuestion(turn) } }, "Edit");
    const asked = el("h2", { class: "asked" }, el("span", { class: "unseen" }, "You: "), turn.question);
    turn.head?.remove();
    turn.head = el("div", {}, el("div", { class: "asked-row" }, asked, edit), shown(turn.pictures));
    turn.node.prepend(turn.head);
    return edit;
  }

  /** Another wording of a question is asked in its place; what came after it answered another question, and goes. */
  function editQuestion(turn) {
    const text = el("textarea", { rows: 1, "aria-label": "Your question, to be asked anew" });
    text.value = turn.question;
    const back = () => showQuestion(turn).focus();
    const later = turns.length - turns.indexOf(turn) - 1;
    const form = el(
      "form",
      { class: "field editing" },
      text,
      el("button", { type: "button", on: { click: back } }, "Cancel"),
      el("button", { type: "submit", class: "primary" }, "Ask"),
    );
    const note = later ? el("p", { class: "note" }, `The ${later === 1 ? "turn" : `${later} turns`} after it will go.`) : null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const question = text.value.trim();
      if (question && ready()) renew(turn, question);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") back();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    turn.head.remove();
    turn.head = el("div", {}, form, note);
    turn.node.prepend(turn.head);
    text.focus();
  }

  function renew(turn, question) {
    drop(turns.splice(turns.indexOf(turn) + 1));
    drop(turn.answers);
    Object.assign(turn, { question, answers: [] });
    showQuestion(turn);
    ask(turn);
    byId("question").focus();
  }

  // ---------------------------------------------------------------------------------------------------------- the whole

  function drop(gone) {
    for (const { node } of gone) node.remove();
  }

  const stop = () => running?.abort();

  function clear() {
    stop();
    running = null;
    onBusy(false);
    drop(turns);
    turns = [];
    save();
    byId("welcome").hidden = false;
    announce("New conversation.");
  }

  const isAtEnd = (slack = 60) => thread.scrollHeight - thread.scrollTop - thread.clientHeight < slack;

  function follow(wanted) {
    if (wanted) thread.scrollTop = thread.scrollHeight; // else the reader has scrolled up: leave the page where it is
  }

  /** The last question, or null. */
  const lastQuestion = () => turns.at(-1)?.question ?? null;

  return { send, stop, clear, lastQuestion, isBusy: () => running !== null };
}
