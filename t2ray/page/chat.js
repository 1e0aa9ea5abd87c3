// The conversation: questions, the answers to each, and what of them is sent along with the next question. One answer
// streams at a time. Not here: how an answer looks (answer.js) and which model is asked (`settings`, from app.js).

import { createAnswer } from "./answer.js";
import { chatStream } from "./api.js";
import { announce, byId, el } from "./dom.js";

const LARGEST_SEED = 2 ** 31;

/** `settings()`: `{ model, temperature, maxTokens, seed, memory }`; `onBusy(busy)` follows the stream. */
export function createChat({ settings, onBusy }) {
  const thread = byId("thread");
  let turns = [];
  let running = null; // the AbortController of the answer that streams

  /** Asks; false when an answer still streams, so that the question stays where it was typed. */
  function send(question) {
    if (running) {
      announce("An answer is still being written. Press Escape to stop it.");
      return false;
    }
    const asked = el("h2", { class: "asked" }, el("span", { class: "unseen" }, "You: "), question);
    const node = el("div", { class: "turn" }, asked);
    const turn = { question, answers: [], node };
    turns.push(turn);
    byId("welcome").hidden = true;
    thread.append(node);
    ask(turn);
    return true;
  }

  async function ask(turn) {
    if (running) return;
    const { model, temperature, maxTokens, memory, seed = Math.floor(Math.random() * LARGEST_SEED) } = settings();
    const answer = createAnswer({ model, seed, temperature, maxTokens }, () => ask(turn));
    for (const failed of turn.answers.filter((old) => old.state === "failed")) failed.node.remove();
    turn.answers = [...turn.answers.filter((old) => old.state !== "failed"), answer];
    turn.node.append(answer.node);
    follow(true);
    const control = new AbortController();
    running = control;
    onBusy(true);
    const messages = [...(memory ? history(turn) : []), { role: "user", content: turn.question }];
    const sampling = { temperature, max_tokens: maxTokens, seed };
    const body = { model, messages, ...sampling, stream: true, stream_options: { include_usage: true } };
    try {
      for await (const chunk of chatStream(body, control.signal, (id) => (answer.requestId = id))) {
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
      follow(isAtEnd(200)); // what is written at the end, such as an error, is taller than a line
    }
  }

  /** The turns before this one that have an answer: of several answers, the last. */
  function history(turn) {
    return turns.slice(0, turns.indexOf(turn)).flatMap(({ question, answers }) => {
      const good = answers.filter(({ state, text }) => (state === "done" || state === "stopped") && text).at(-1);
      return good ? [{ role: "user", content: question }, { role: "assistant", content: good.text }] : [];
    });
  }

  const stop = () => running?.abort();

  function clear() {
    stop();
    running = null;
    onBusy(false);
    for (const { node } of turns) node.remove();
    turns = [];
    byId("welcome").hidden = false;
    announce("New conversation.");
  }

  const isAtEnd = (slack = 60) => thread.scrollHeight - thread.scrollTop - thread.clientHeight < slack;

  function follow(wanted) {
    if (wanted) thread.scrollTop = thread.scrollHeight; // else the reader has scrolled up: leave the page where it is
  }

  return { send, stop, clear, isBusy: () => running !== null };
}
