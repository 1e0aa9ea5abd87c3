// The pictures of a question: chosen as files, pasted or dropped. A large one is made smaller before it is sent; what a
// camera wrote beside the pixels stays here.

import { announce, byId, el } from "./dom.js";

const LONGEST = 1024; // pixels of a side
const MOST = 8;

/** A question's content for the API: text alone, or its pictures and then the text. */
export const content = (question, pictures) =>
  pictures.length ? [...pictures.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }] : question;

/** The pictures of a question, as the conversation shows them; null where there are none. */
export const shown = (pictures) =>
  pictures.length ? el("div", { class: "pictures" }, ...pictures.map((src, i) => el("img", { src, alt: `Picture ${i + 1}` }))) : null;

/** The pictures that wait to be sent with the next question. */
export function createPictures() {
  const tray = byId("tray");
  let urls = [];

  function show() {
    tray.hidden = !urls.length;
    tray.replaceChildren(
      ...urls.map((src, i) => {
        const drop = () => {
          urls.splice(i, 1);
          show();
          byId("question").focus();
        };
        const label = `Remove picture ${i + 1}`;
        return el("li", {}, el("img", { src, alt: "" }), el("button", { type: "button", class: "quiet", "aria-label": label, on: { click: drop } }, "×"));
      }),
    );
  }

  async function add(files) {
    for (const file of [...files].filter(({ type }) => type.startsWith("image/"))) {
      if (urls.length === MOST) return announce(`A question has at most ${MOST} pictures.`);
      try {
        urls.push(await small(file));
        announce(`Picture ${urls.length} is attached.`);
      } catch {
        announce(`${file.name} is no picture that this browser can read.`);
      }
      show();
    }
  }

  byId("attach").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", async ({ target }) => {
    await add(target.files);
    target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return;
    event.preventDefault();
    add(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer?.files.length) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });

  function clear() {
    urls = [];
    show();
  }

  return { clear, urls: () => urls };
}

/** A file's picture as a `data:` URI, its longer side at most `LONGEST`: as PNG, or as JPEG where it is a photograph. */
async function small(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = el("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return file.type === "image/jpeg" ? canvas.toDataURL("image/jpeg", 0.9) : canvas.toDataURL("image/png");
}
