(() => {
"use strict";
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const page = document.documentElement;
page.classList.add("js");

// ---- light and dark
document.getElementById("theme").addEventListener("click", () => {
  const dark = page.dataset.theme ? page.dataset.theme === "dark" : matchMedia("(prefers-color-scheme:dark)").matches;
  page.dataset.theme = dark ? "light" : "dark";
});

// ---- one measure at a time
const chips = $$("[data-show]");
function show(measure) {
  for (const chip of chips) {
    const on = chip.dataset.show === measure;
    chip.setAttribute("aria-checked", on);
    chip.tabIndex = on ? 0 : -1;
  }
  for (const figure of $$(".front[data-measure]")) figure.hidden = figure.dataset.measure !== measure;
}
chips.forEach((chip, at) => {
  chip.addEventListener("click", () => show(chip.dataset.show));
  chip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = chips[(at + step + chips.length) % chips.length];
    show(next.dataset.show);
    next.focus();
  });
});
if (chips.length) show(chips[0].dataset.show);

// ---- single out methods
for (const key of $$(".key")) {
  key.addEventListener("click", () => {
    key.setAttribute("aria-pressed", key.getAttribute("aria-pressed") !== "true");
    const chosen = $$(".key[aria-pressed=true]").map((one) => "method-" + one.dataset.method);
    for (const figure of $$(".front[data-measure]")) {
      figure.classList.toggle("picked", chosen.length > 0);
      for (const mark of $$(".method", figure)) {
        mark.classList.toggle("chosen", chosen.some((name) => mark.classList.contains(name)));
      }
    }
  });
}

// ---- tips
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
});

// ---- copy buttons
for (const button of $$("[data-copy]")) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

page.dataset.ready = "1";
})();
