// Applies the stored colours before the first paint, which is why it is no module: those run after the page is parsed.
"use strict";
{
  const stored = localStorage.getItem("t2ray-theme");
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
}
