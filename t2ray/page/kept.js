// What a reload leaves as it was: the conversation, who answers, the sliders, the sampling. It is kept in the tab, and
// gone when the tab is closed.

const PREFIX = "t2ray-kept-";

export function keep(name, value) {
  try {
    sessionStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    sessionStorage.removeItem(PREFIX + name); // the browser's store is full: better nothing than an old state
  }
}

/** What was kept by this name, else null. */
export const kept = (name) => JSON.parse(sessionStorage.getItem(PREFIX + name));
