(() => {
"use strict";
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const page = document.documentElement;
page.classList.add("js");

// ---- building blocks

function make(tag, attributes, ...children) {
  const svg = /^(svg|g|rect|path|text|circle|line)$/.test(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function number(value, digits = 3, sign = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(size) && size < 1000) text = String(size);
  else if (size < 1e-4) {
    const [base, power] = size.toExponential(1).split("e-");
    text = base + "\u202f×\u202f10⁻" + [...power].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("");
  } else if (size >= 1000) text = Math.round(size).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
  else text = size.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
  if (value < 0 && /[1-9]/.test(text)) return "\u2212" + text;
  return (sign && value > 0 ? "+" : "") + text;
}

function percent(value, digits, sign) {
  const size = Math.abs(value);
  if (size > 0 && size < 0.01) return value > 0 ? "<0.01" : ">\u22120.01";
  if (size === 0 || size > 999) return number(value, 2, sign);
  const shown = size >= 10 ? digits : Math.min(digits, 2);
  const text = size.toFixed(Math.max(0, shown - 1 - Math.floor(Math.log10(size)))).replace(/^100\..*/, "100");
  return (value < 0 ? "\u2212" : sign && value > 0 ? "+" : "") + text;
}

function quantity(value, unit, digits = 3, sign = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (unit === "share") return percent(100 * value, digits, sign) + "\u202f%";
  if (unit === "ratio") return number(value, digits, sign) + "\u202f×";
  return number(value, digits, sign) + (unit ? " " + unit : "");
}

const visible = (token) => {
  const shown = token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return shown.trim() || shown.replace(/ /g, "·") || "∅";
};

function place(value, low, high, scale) {
  if (scale === "log") {
    if (!(value > 0)) return 0;
    [value, low, high] = [Math.log(value), Math.log(low), Math.log(high)];
  }
  return Math.min(1, Math.max(0, (value - low) / (high - low)));
}

const levelOf = (value, m) => {
  if (value === null) return "none";
  const t = place(value, m.low, m.high, m.scale);
  return m.scale === "diverging" ? "d" + Math.round(t * 24) : "q" + Math.round(t * 31);
};

let palette = [];
function readPalette() {
  const style = getComputedStyle(page);
  const rgb = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  palette = Array.from({ length: 32 }, (_, i) => rgb("--q" + i));
}
const colour = (name) => getComputedStyle(page).getPropertyValue(name).trim();

// ---- reading the numbers

async function unpack(id) {
  const node = document.getElementById(id);
  const text = atob(node.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  node.textContent = "";
  if (node.dataset.encoding === "none") return bytes;
  if (typeof DecompressionStream === "function") {
    try {
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
      return new Uint8Array(await new Response(stream).arrayBuffer());
    } catch { /* an older browser without deflate-raw */ }
  }
  return inflate(bytes);
}

// RFC 1951, for browsers without DecompressionStream
function inflate(input) {
  let at = 0, hold = 0, held = 0, size = 0;
  let out = new Uint8Array(input.length * 4);
  const bits = (count) => {
    while (held < count) { hold |= input[at++] << held; held += 8; }
    const value = hold & ((1 << count) - 1);
    hold >>>= count; held -= count;
    return value;
  };
  const room = (count) => {
    if (size + count <= out.length) return;
    const bigger = new Uint8Array(Math.max(out.length * 2, size + count));
    bigger.set(out); out = bigger;
  };
  const code = (lengths) => {
    const counts = new Uint16Array(16), next = new Uint16Array(16);
    for (const length of lengths) counts[length]++;
    counts[0] = 0;
    for (let i = 1; i < 16; i++) next[i] = next[i - 1] + counts[i - 1];
    const symbols = new Uint16Array(lengths.length);
    lengths.forEach((length, symbol) => { if (length) symbols[next[length]++] = symbol; });
    return { counts, symbols };
  };
  const symbol = ({ counts, symbols }) => {
    let value = 0, first = 0, index = 0;
    for (let length = 1; length < 16; length++) {
      value |= bits(1);
      const count = counts[length];
      if (value - count < first) return symbols[index + value - first];
      index += count; first = (first + count) << 1; value <<= 1;
    }
    throw new Error("damaged data");
  };
  const lengthBase = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
  const lengthBits = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
  const farBase = [1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577];
  const order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
  let last;
  do {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      hold = held = 0;
      const length = input[at] | (input[at + 1] << 8);
      at += 4; room(length);
      out.set(input.subarray(at, at + length), size);
      at += length; size += length;
      continue;
    }
    let literal, far;
    if (kind === 1) {
      literal = code(Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)));
      far = code(Array(30).fill(5));
    } else {
      const literals = bits(5) + 257, fars = bits(5) + 1, codes = bits(4) + 4;
      const lengths = Array(19).fill(0);
      for (let i = 0; i < codes; i++) lengths[order[i]] = bits(3);
      const table = code(lengths), all = [];
      while (all.length < literals + fars) {
        const value = symbol(table);
        if (value < 16) all.push(value);
        else {
          const repeated = value === 16 ? all[all.length - 1] : 0;
          let count = value === 16 ? 3 + bits(2) : value === 17 ? 3 + bits(3) : 11 + bits(7);
          while (count--) all.push(repeated);
        }
      }
      literal = code(all.slice(0, literals));
      far = code(all.slice(literals));
    }
    for (;;) {
      let value = symbol(literal);
      if (value === 256) break;
      if (value < 256) { room(1); out[size++] = value; continue; }
      value -= 257;
      let count = lengthBase[value] + bits(lengthBits[value]);
      const code_ = symbol(far);
      const back = farBase[code_] + bits(code_ < 2 ? 0 : (code_ >> 1) - 1);
      room(count);
      while (count--) { out[size] = out[size - back]; size++; }
    }
  } while (!last);
  return out.subarray(0, size);
}

let bytes;
function reader(packed) {
  const { at, low, high, scale, steps } = packed;
  const ratio = scale === "log" ? Math.log(high / low) : high - low;
  return (i) => {
    const raw = bytes[at + i];
    if (raw === 255) return null;
    return scale === "log" ? low * Math.exp((ratio * raw) / steps) : low + (ratio * raw) / steps;
  };
}

// ---- tooltip

const tip = $("#tip");
function showTip(content, x, y) {
  tip.replaceChildren(...[content].flat());
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(12, x + 16), innerWidth - box.width - 12);
  let top = y + 18;
  if (top + box.height > innerHeight - 8) top = y - box.height - 14;
  tip.style.left = left + "px";
  tip.style.top = Math.max(8, top) + "px";
}
const hideTip = () => { tip.hidden = true; };
document.addEventListener("pointermove", (event) => {
  const marked = event.target.closest?.("[data-tip]");
  if (marked) showTip(marked.dataset.tip, event.clientX, event.clientY);
  else if (!event.target.closest?.(".c,.t,.hit")) hideTip();
});
document.addEventListener("pointerleave", hideTip);
addEventListener("scroll", hideTip, { passive: true, capture: true });

const say = (text) => { $("#said").textContent = text; };

// ---- radio groups

function radios(group, choose) {
  const items = $$("[role=radio]", group);
  const set = (item, focus) => {
    for (const other of items) {
      other.setAttribute("aria-checked", other === item);
      other.tabIndex = other === item ? 0 : -1;
    }
    if (group.scrollWidth > group.clientWidth) group.scrollTo({ left: item.offsetLeft - group.offsetLeft - 60 });
    if (focus) item.focus();
  };
  items.forEach((item, i) => {
    item.addEventListener("click", () => { set(item); choose(item.dataset); });
    item.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault(); event.stopPropagation();
      const next = items[(i + step + items.length) % items.length];
      set(next, true); choose(next.dataset);
    });
  });
  return (test) => { const item = items.find((one) => test(one.dataset)); if (item) set(item); };
}

// ---- pooled maps

const mapCache = new Map();

// column by column, of a causal map only the visible half; returned row by row
function mapLevels(stack, name) {
  const [start, size] = stack.cards.of[name].map;
  const levels = new Uint8Array(size * size);
  let at = start;
  for (let key = 0; key < size; key++)
    for (let query = stack.causal ? key : 0; query < size; query++) levels[query * size + key] = bytes[at++];
  return levels;
}
const shareOf = (level, stack) => (level / stack.cards.steps) ** 3;

function paint(canvas, size, causal, levelAt) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    const hidden = causal && i % size > Math.floor(i / size);
    image.data.set([...palette[Math.round(Math.min(1, levelAt(i)) * 31)], hidden ? 0 : 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function mapImage(stack, name) {
  const key = stack.name + "." + name;
  if (!stack.cards.of[name]?.map) return null;
  if (!mapCache.has(key)) {
    const levels = mapLevels(stack, name);
    mapCache.set(key, paint(make("canvas"), stack.cards.of[name].map[1], stack.causal, (i) => levels[i] / stack.cards.steps));
  }
  return mapCache.get(key);
}

// ---- head atlas

class Atlas {
  constructor(stack, index) {
    this.stack = stack;
    this.section = document.getElementById(index ? "atlas-" + index : "atlas");
    this.ok = !!this.section;
    if (!this.ok) return;
    this.svg = $(".grid-map", this.section);
    this.plot = $(".plot", this.svg);
    this.cellGroup = $(".cells", this.svg);
    this.cells = $$(".c", this.svg);
    this.measure = stack.measures[0];
    this.lit = null;
    this.current = 0;
    this.pick = radios($("[role=radiogroup]", this.section), (data) => this.show(data.measure, true));
    this.cells.forEach((cell, i) => {
      cell.setAttribute("role", "gridcell");
      cell.tabIndex = i ? -1 : 0;
      cell.dataset.i = i;
    });
    const cellAt = (event) => event.target.closest?.(".c");
    this.svg.addEventListener("pointermove", (event) => {
      const cell = cellAt(event);
      if (cell) showTip(this.summary(+cell.dataset.i), event.clientX, event.clientY);
    });
    this.svg.addEventListener("pointerleave", hideTip);
    this.svg.addEventListener("click", (event) => {
      const cell = cellAt(event);
      if (cell) { this.focus(+cell.dataset.i); openCard(this, +cell.dataset.i); }
    });
    this.svg.addEventListener("focusin", (event) => {
      const cell = cellAt(event);
      if (!cell) return;
      const i = +cell.dataset.i;
      cell.setAttribute("aria-label", this.name(i) + ", " + this.measure.name + " " + this.text(this.measure, i));
      if (cell.matches(":focus-visible")) {
        const box = cell.getBoundingClientRect();
        showTip(this.summary(i), box.right, box.bottom);
      }
    });
    this.svg.addEventListener("focusout", hideTip);
    this.svg.addEventListener("keydown", (event) => this.key(event));
    $(".patterns", this.section)?.addEventListener("click", () => this.patterns());
    [this.ring, this.pointer] = ["ring", "pointer"].map((css) => make("rect", { class: css, visibility: "hidden" }));
    this.plot.append(this.pointer, this.ring);
    const point = (event) => { const cell = cellAt(event); if (cell) this.put(this.pointer, +cell.dataset.i); };
    const away = () => this.put(this.pointer, -1);
    for (const kind of ["pointerover", "focusin"]) this.svg.addEventListener(kind, point);
    for (const kind of ["pointerleave", "focusout"]) this.svg.addEventListener(kind, away);
    this.layout();
    this.show(this.measure.key);
    new ResizeObserver(() => this.layout()).observe($(".atlas-map", this.section));
  }

  name(i) { return "L" + Math.floor(i / this.stack.heads) + "H" + (i % this.stack.heads); }
  link(i) { return "#" + (this.stack.name ? this.stack.name + "." : "") + this.name(i); }
  text(measure, i, digits = 3) {
    const se = measure.error?.[i];
    const factor = measure.unit === "share" ? 100 : 1;
    const value = quantity(measure.values[i], measure.unit, digits);
    return se ? value + " ± " + number(se * factor, 1) : value;
  }

  // for narrow columns: two digits beside a standard error, the unit once
  brief(measure, i) {
    const se = measure.error?.[i];
    if (!se) return [quantity(measure.values[i], measure.unit)];
    return [quantity(measure.values[i], measure.unit, 2) + " ", make("span", {}, "± " + number(measure.unit === "share" ? 100 * se : se, 1))];
  }

  summary(i) {
    const rows = this.stack.measures.flatMap((m) => {
      const css = m === this.measure ? "now" : null;
      return [make("dt", { class: css }, m.label), make("dd", { class: css }, quantity(m.values[i], m.unit, 2))];
    });
    return [make("b", {}, this.name(i)), make("dl", {}, rows)];
  }

  show(key, link) {
    const measure = this.stack.measures.find((m) => m.key === key);
    if (!measure) return false;
    this.measure = measure;
    this.cells.forEach((cell, i) => {
      const kept = this.lit?.has(i) ? " lit" : "";
      cell.setAttribute("class", "c " + levelOf(measure.values[i], measure) + kept);
    });
    this.cellGroup.setAttribute("aria-label", measure.name + " of each head, by layer");
    this.pick((data) => data.measure === key);
    this.read();
    this.table();
    if (link) { say("Coloured by " + measure.name); setHash("measure=" + key); }
    return true;
  }

  read() {
    const m = this.measure;
    const body = $(".reading-body", this.section);
    $("h3", body.parentNode).textContent = m.name;
    const filled = m.values.map((v, i) => [v, i]).filter(([v]) => v !== null);
    const bins = new Array(32).fill(0);
    for (const [v] of filled) bins[Math.min(31, Math.floor(place(v, m.low, m.high, m.scale) * 32))]++;
    const most = Math.max(...bins, 1);
    const css = (k) => (m.scale === "diverging" ? "d" + Math.round((k / 31) * 24) : "q" + k);
    const bars = bins.map((count, k) => make("rect", {
      class: css(k), x: k * 10, width: 10, y: 44 - (40 * count) / most, height: (40 * count) / most,
      "data-tip": count + (count === 1 ? " head" : " heads"),
    }));
    const ramp = bins.map((_, k) => make("rect", { class: css(k), x: k * 10, width: 10.5, y: 46, height: 8 }));
    const best = filled.sort((a, b) => b[0] - a[0]).slice(0, 5).flatMap(([v, i]) => [
      make("a", { href: this.link(i) }, this.name(i)),
      make("svg", { class: "meter", height: 8, "aria-hidden": "true" },
        make("rect", { class: "rail", width: "100%", height: 8 }),
        make("rect", { class: "fill", width: 100 * place(v, m.scale === "diverging" ? 0 : m.low, m.high, m.scale) + "%", height: 8 })),
      make("span", {}, quantity(v, m.unit)),
    ]);
    const lit = this.lit && make("p", { class: "lit-note" }, this.lit.size + (this.lit.size === 1 ? " head" : " heads") + " marked",
      make("button", { type: "button", onclick: () => this.mark(null) }, "Clear"));
    body.replaceChildren(...[
      make("p", {}, m.short), lit,
      make("div", { class: "scale" },
        make("svg", { viewBox: "0 0 320 54", height: 48, preserveAspectRatio: "none", role: "img", "aria-label": "Distribution over heads" }, bars, ramp),
        make("div", {}, make("span", {}, quantity(m.low, m.unit, 2)), make("span", {}, (m.scale === "log" ? "log scale" : "heads")), make("span", {}, quantity(m.high, m.unit, 2)))),
      make("div", { class: "best" }, best),
      make("details", { class: "about" }, make("summary", {}, "Definition"),
        make("div", {}, make("p", {}, make("code", {}, m.formula)), make("p", { class: "quiet" }, m.source))),
    ].filter(Boolean));
  }

  table() {
    const box = $(".as-table", this.section);
    if (!box) return;
    const fill = () => {
      const m = this.measure;
      const rows = m.values.map((v, i) => [v, i]).filter(([v]) => v !== null).sort((a, b) => b[0] - a[0]).slice(0, 60);
      $("thead th:last-child", box).textContent = m.name;
      $("tbody", box).replaceChildren(...rows.map(([, i]) => make("tr", {},
        make("th", { scope: "row" }, make("a", { href: this.link(i) }, this.name(i))), make("td", {}, this.text(m, i)))));
    };
    box.ontoggle = fill;
    if (box.open) fill();
  }

  layout() {
    const { layers, heads } = this.stack;
    const tall = this.section.clientWidth < 600 && layers > 12 && heads <= 16;
    this.tall = tall;
    const [columns, rows] = tall ? [heads, layers] : [layers, heads];
    const size = tall ? Math.max(14, Math.min(24, 560 / rows)) : Math.max(9, Math.min(30, 420 / rows));
    const height = rows * size;
    this.svg.style.setProperty("--w", 100 / columns + "%");
    this.svg.style.setProperty("--h", size + "px");
    this.svg.setAttribute("height", height + 28);
    this.plot.setAttribute("height", height);
    this.cells.forEach((cell, i) => {
      const [layer, head] = [Math.floor(i / heads), i % heads];
      const [x, y] = tall ? [head, layer] : [layer, head];
      cell.setAttribute("x", (100 * x) / columns + "%");
      cell.setAttribute("y", y * size);
    });
    const every = (count, room) => [1, 2, 5, 10, 20, 50].find((s) => count / s <= room);
    const names = [];
    const [down, across] = tall ? ["L", "H"] : ["H", "L"];
    const step = size >= 13 ? 1 : 4;
    for (let r = 0; r < rows; r += step) names.push(make("text", { class: "tick end", x: 0, dx: -8, y: (r + 0.5) * size + 4 }, down + r));
    for (let c = 0; c < columns; c += every(columns, this.section.clientWidth > 700 ? 32 : 16))
      names.push(make("text", { class: "tick mid", x: (100 * (c + 0.5)) / columns + "%", y: height + 18 }, columns > 16 ? c : across + c));
    $(".names", this.svg).replaceChildren(...names);
    if (opened?.atlas === this) this.put(this.ring, opened.i);
    this.drawPatterns();
  }

  patterns(on = !this.section.classList.contains("show-patterns")) {
    const button = $(".patterns", this.section);
    if (!button) return;
    this.section.classList.toggle("show-patterns", on);
    button.setAttribute("aria-pressed", on);
    this.drawPatterns();
  }

  drawPatterns() {
    if (!this.section.classList.contains("show-patterns")) return;
    const canvas = $(".pattern-layer", this.section);
    const outer = canvas.parentNode.getBoundingClientRect();
    const boxes = this.cells.map((cell) => cell.getBoundingClientRect());
    const left = Math.min(...boxes.map((b) => b.left)), top = Math.min(...boxes.map((b) => b.top));
    const right = Math.max(...boxes.map((b) => b.right)), bottom = Math.max(...boxes.map((b) => b.bottom));
    const density = Math.min(devicePixelRatio || 1, 2);
    canvas.width = (right - left) * density;
    canvas.height = (bottom - top) * density;
    Object.assign(canvas.style, { left: left - outer.left + "px", top: top - outer.top + "px", width: right - left + "px", height: bottom - top + "px" });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    boxes.forEach((box, i) => {
      const image = mapImage(this.stack, this.name(i));
      if (!image) return;
      const [x, y] = [(box.left - left + 1) * density, (box.top - top + 1) * density];
      context.drawImage(image, x, y, (box.width - 2) * density, (box.height - 2) * density);
    });
  }

  mark(names) {
    this.lit = names ? new Set(names.map((name) => this.index(name)).filter((i) => i >= 0)) : null;
    this.cellGroup.classList.toggle("dim", !!this.lit);
    this.cells.forEach((cell, i) => cell.classList.toggle("lit", !!this.lit?.has(i)));
    this.read();
  }

  put(ring, i) {
    ring.setAttribute("visibility", i < 0 ? "hidden" : "visible");
    if (i < 0) return;
    for (const key of ["x", "y"]) ring.setAttribute(key, this.cells[i].getAttribute(key));
  }

  index(name) {
    const found = /^L(\d+)H(\d+)$/i.exec(name);
    if (!found || +found[1] >= this.stack.layers || +found[2] >= this.stack.heads) return -1;
    return +found[1] * this.stack.heads + +found[2];
  }

  focus(i, move) {
    this.cells[this.current].tabIndex = -1;
    this.current = i;
    this.cells[i].tabIndex = 0;
    if (move) this.cells[i].focus();
  }

  key(event) {
    const { layers, heads } = this.stack;
    let [layer, head] = [Math.floor(this.current / heads), this.current % heads];
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (event.key in moves) {
      let [dl, dh] = moves[event.key];
      if (this.tall) [dl, dh] = [dh, dl];
      layer = Math.min(layers - 1, Math.max(0, layer + dl));
      head = Math.min(heads - 1, Math.max(0, head + dh));
    } else if (event.key === "Home") layer = 0;
    else if (event.key === "End") layer = layers - 1;
    else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      openCard(this, this.current, true);
      return;
    } else return;
    event.preventDefault();
    this.focus(layer * heads + head, true);
    if (opened) openCard(this, this.current);
  }
}

// ---- head card

const cardBox = $("#card");
let opened = null;

function openCard(atlas, i, focus, quiet) {
  if (opened) opened.atlas.put(opened.atlas.ring, -1);
  opened = { atlas, i };
  atlas.put(atlas.ring, i);
  const { stack } = atlas, name = atlas.name(i), card = stack.cards.of[name] || {};
  const step = (by) => () => stepCard(by);
  const tags = (card.tags || []).map((tag) => make("span", { class: "pill" }, tag));
  const head = make("div", { class: "card-head" },
    make("h2", { id: "card-title" }, (stack.name ? stack.label + " " : "") + name), tags,
    make("span", { class: "quiet hint push" }, "j and k: next and previous head"),
    make("button", { type: "button", onclick: step(-1), "aria-label": "Previous head" }, "‹"),
    make("button", { type: "button", onclick: step(1), "aria-label": "Next head" }, "›"),
    make("button", { type: "button", class: "close", onclick: () => closeCard(true) }, "Close"));
  const left = make("div", {});
  const image = mapImage(stack, name);
  if (image) {
    const canvas = make("canvas", { class: "card-map", width: image.width, height: image.height, role: "img", "aria-label": "Pooled attention map of " + name });
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const size = image.width, levels = mapLevels(stack, name);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * size), y = Math.floor(((event.clientY - box.top) / box.height) * size);
      if (x < 0 || y < 0 || x >= size || y >= size) return;
      canvas.dataset.tip = "queries " + span(y, size, stack) + " give " + quantity(shareOf(levels[y * size + x], stack), "share", 2) + " to keys " + span(x, size, stack);
    });
    left.append(canvas, make("p", { class: "cap" }, "Keys to the right, queries downwards; share of attention, cube-root scale."));
  } else left.append(make("p", { class: "cap" }, "No map was stored for this head."));
  const middle = make("div", {});
  if (card.received) middle.append(make("h3", {}, "Received along the text"), spark(card.received));
  if (card.distance) middle.append(make("h3", {}, "Distance looked back"), distances(card.distance, stack.edges));
  if (card.keys) {
    middle.append(make("h3", {}, "Keys it looks at most"), make("ol", { class: "keys" }, card.keys.map(([position, mass, token]) =>
      make("li", {}, make("code", {}, visible(token ?? stack.sequence?.tokens[position] ?? "")), make("span", {}, String(position)), make("span", {}, quantity(mass, "share", 2))))));
  }
  const rows = stack.measures.map((m) => {
    const value = m.values[i];
    const rank = value === null ? null : m.values.filter((v) => v !== null && v > value).length + 1;
    return make("div", { "data-tip": rank ? m.name + ": rank " + rank + " of " + m.values.filter((v) => v !== null).length : m.name },
      make("dt", {}, m.label), make("dd", {}, ...atlas.brief(m, i)),
      value === null ? "" : make("small", {}, rankMark(place(value, m.low, m.high, m.scale))));
  });
  cardBox.replaceChildren(head, make("div", { class: "card-body" }, left, middle, make("dl", { class: "all" }, rows)));
  const first = cardBox.hidden;
  cardBox.hidden = false;
  document.body.classList.add("card-open");
  if (first && innerWidth > 700) reveal(atlas);
  if (focus) cardBox.focus({ preventScroll: true });
  if (!quiet) { setHash(atlas.link(i).slice(1)); say("Head " + name); }
}

function rankMark(t) {
  const mark = make("i");
  mark.style.left = "calc(" + 100 * t + "% - 1.5px)";
  return mark;
}

function reveal(atlas) {
  const map = $(".atlas-map", atlas.section).getBoundingClientRect();
  const free = innerHeight - cardBox.offsetHeight;
  if (map.bottom > free || map.top < 60) scrollBy({ top: map.top - Math.max(70, Math.min(120, free - map.height - 20)) });
}

function span(block, size, stack) {
  const count = stack.sequence?.count;
  if (!count) return String(block);
  const width = count / size;
  return Math.floor(block * width) + "–" + Math.max(Math.floor((block + 1) * width) - 1, Math.floor(block * width));
}

function spark(packed) {
  const read = reader(packed), values = Array.from({ length: packed.size }, (_, i) => read(i) ?? 0);
  const most = Math.max(...values, 1e-12), low = Math.max(Math.min(...values.filter((v) => v > 0)), most * 1e-4);
  const points = values.map((v, i) => ((i + 0.5) * 300) / values.length + " " + (44 - 40 * place(v, low, most, "log")).toFixed(1));
  return make("svg", { class: "spark", height: 46, viewBox: "0 0 300 46", preserveAspectRatio: "none", role: "img", "aria-label": "Attention received along the text, log scale" },
    make("path", { class: "area", d: "M0 46L" + points.join("L") + "L300 46Z" }), make("path", { class: "line", d: "M" + points.join("L") }));
}

function distances(shares, edges) {
  const most = Math.max(...shares.map((s) => s ?? 0), 1e-12), width = 100 / shares.length;
  const bars = shares.map((share, k) => {
    const h = (38 * (share ?? 0)) / most;
    const from = edges[k], to = edges[k + 1];
    const where = to === undefined ? from + " or more" : to - from === 1 ? from : from + " to " + (to - 1);
    return make("rect", { x: k * width + 0.6 + "%", width: width - 1.2 + "%", y: 40 - h, height: Math.max(h, 0.5), "data-tip": quantity(share, "share", 2) + " at distance " + where });
  });
  const step = Math.ceil(shares.length / 7);
  const labels = shares.flatMap((_, k) => (k % step ? [] : [make("text", { class: "tick", x: k * width + 0.6 + "%", y: 53 }, number(edges[k]))]));
  return make("svg", { class: "spark", height: 56, role: "img", "aria-label": "Share of attention by distance in tokens" }, bars, labels);
}

function closeCard(refocus) {
  if (!opened) return;
  const { atlas, i } = opened;
  atlas.put(atlas.ring, -1);
  opened = null;
  cardBox.hidden = true;
  document.body.classList.remove("card-open");
  setHash("");
  if (refocus) { atlas.focus(i); atlas.cells[i].focus({ preventScroll: true }); hideTip(); }
}

function stepCard(by) {
  const atlas = opened?.atlas || atlases.find((one) => one?.ok);
  if (!atlas) return;
  const i = opened ? opened.i + by : atlas.current;
  const next = (i + atlas.cells.length) % atlas.cells.length;
  atlas.focus(next);
  openCard(atlas, next);
}

// ---- text

class Text {
  constructor(stack, index) {
    this.sequence = stack.sequence;
    this.section = document.getElementById(index ? "text-" + index : "text");
    this.ok = !!(this.section && this.sequence);
    if (!this.ok) return;
    const { sequence } = this;
    this.words = sequence.tokens.length ? sequence.tokens : Array.from({ length: sequence.count }, (_, i) => " " + i);
    this.readers = Object.fromEntries(Object.entries(sequence.series).map(([key, packed]) => [key, reader(packed)]));
    this.marks = ["sinks", "anchors", "peaks"].map((kind) => new Set(sequence[kind]));
    this.key = "received";
    this.layer = -1;
    this.box = $(".tokens", this.section);
    this.at = -1;
    this.chunks();
    const groups = $("[role=radiogroup]", this.section);
    const slider = $(".layer-pick input", this.section);
    radios(groups, (data) => { this.key = data.series; this.shade(); });
    slider?.addEventListener("input", () => {
      this.layer = +slider.value;
      slider.nextElementSibling.textContent = this.layer < 0 ? "all" : this.layer;
      slider.setAttribute("aria-valuetext", this.layer < 0 ? "all layers" : "layer " + this.layer);
      this.shade();
      this.drawMatrix?.();
    });
    this.slider = slider?.parentNode;
    if (this.slider && !sequence.layers) this.slider.hidden = true;
    this.box.addEventListener("pointerover", (event) => this.hover(event));
    this.box.addEventListener("pointermove", (event) => this.hover(event));
    this.box.addEventListener("pointerleave", hideTip);
    this.box.addEventListener("scroll", () => this.map(), { passive: true });
    this.box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.select(Math.min(this.words.length - 1, Math.max(0, this.at + step)));
    });
    this.canvas = $(".minimap", this.section);
    this.matrix(stack);
    const jump = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = this.canvas.getBoundingClientRect();
      this.reveal(Math.floor(((event.clientX - box.left) / box.width) * this.words.length));
    };
    this.canvas.addEventListener("pointerdown", jump);
    this.canvas.addEventListener("pointermove", jump);
    new ResizeObserver(() => this.map()).observe(this.canvas);
    this.shade();
  }

  matrix(stack) {
    const canvas = $(".segments canvas", this.section);
    if (!canvas) return;
    let shares, size;
    this.drawMatrix = () => {
      shares = null;
      let count = 0;
      for (const [name, card] of Object.entries(stack.cards.of)) {
        if (!card.map || (this.layer >= 0 && !name.startsWith("L" + this.layer + "H"))) continue;
        const levels = mapLevels(stack, name);
        size = card.map[1];
        shares = shares || new Float64Array(size * size);
        for (let i = 0; i < size * size; i++) shares[i] += shareOf(levels[i], stack);
        count++;
      }
      if (!shares) return;
      shares = shares.map((share) => share / count);
      paint(canvas, size, stack.causal, (i) => Math.cbrt(shares[i]));
      $(".segments span", this.section).textContent = this.layer < 0 ? "all heads" : "layer " + this.layer;
    };
    const cell = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top].map((v) => Math.min(size - 1, Math.max(0, Math.floor((v / box.width) * size))));
    };
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = cell(event);
      canvas.dataset.tip = "tokens " + span(y, size, stack) + " give " + quantity(shares[y * size + x], "share", 2) + " to tokens " + span(x, size, stack);
    });
    canvas.addEventListener("click", (event) => this.reveal(Math.floor(((cell(event)[1] + 0.5) / size) * this.words.length)));
    this.drawMatrix();
  }

  chunks() {
    const { grid } = this.sequence;
    if (grid) {
      const part = make("div", { class: "patch-grid" });
      part.style.gridTemplateColumns = "repeat(" + grid[1] + ",1fr)";
      this.parts = [Object.assign(part, { from: 0, to: this.words.length, built: false })];
      this.box.replaceChildren(part);
      this.build(part);
      return;
    }
    const ends = [];
    let start = 0;
    while (start < this.words.length) {
      let end = Math.min(start + 260, this.words.length);
      if (end < this.words.length) {
        for (let i = end; i > start + 120; i--) if (this.words[i - 1].includes("\n")) { end = i; break; }
        if (!this.words[end - 1].includes("\n")) for (let i = end; i > start + 160; i--) if (/[.!?]\s*$/.test(this.words[i - 1])) { end = i; break; }
      }
      ends.push([start, end]);
      start = end;
    }
    const width = Math.max(this.box.clientWidth - 100, 200);
    this.parts = ends.map(([from, to]) => {
      const part = make("div", { class: "chunk", "data-from": number(from) });
      const length = this.words.slice(from, to).join("").length;
      part.style.containIntrinsicSize = "auto " + Math.ceil((length * 7.4) / width) * 30 + "px";
      part.style.minHeight = Math.ceil((length * 5) / width) * 30 + "px";
      Object.assign(part, { from, to, built: false });
      return part;
    });
    this.box.replaceChildren(...this.parts);
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.build(entry.target);
    }, { root: this.box, rootMargin: "800px" });
    this.parts.forEach((part) => watch.observe(part));
    this.build(this.parts[0]);
    addEventListener("beforeprint", () => this.parts.slice(0, 2).forEach((part) => this.build(part)));
  }

  build(part) {
    if (part.built) return;
    part.built = true;
    part.style.minHeight = "";
    const shade = this.shader();
    const spans = [];
    for (let i = part.from; i < part.to; i++) {
      const span = document.createElement("span");
      span.textContent = this.words[i].replace(/\n/g, "↵\n");
      span.className = this.css(i, shade);
      span.i = i;
      spans.push(span);
    }
    part.replaceChildren(...spans);
  }

  css(i, shade) {
    const [sinks, anchors, peaks] = this.marks;
    return "t s" + Math.round(shade(i) * 10) + (sinks.has(i) ? " sink" : anchors.has(i) ? " anchor" : "") + (peaks.has(i) ? " peak" : "") + (i === this.at ? " at" : "");
  }

  shader() {
    const { layers, series } = this.sequence;
    if (this.key === "received" && this.layer >= 0 && layers) {
      const start = layers.at + this.layer * this.sequence.count;
      return (i) => Math.min(bytes[start + i], layers.steps) / layers.steps;
    }
    const { shade: [low, high], scale } = series[this.key], read = this.readers[this.key];
    return (i) => place(read(i) ?? 0, low, high, scale);
  }

  shade() {
    const shade = this.shader();
    for (const part of this.parts) if (part.built) for (const span of part.children) span.className = this.css(span.i, shade);
    if (this.slider) this.slider.style.visibility = this.key === "received" ? "" : "hidden";
    const { name } = this.sequence.series[this.key];
    $(".ramp", this.section).nextSibling.data = this.key === "received" ? "little to much attention received, log scale" : "low to high " + name.toLowerCase().replace("fai", "FAI").replace("waad", "WAAD");
    this.map();
  }

  facts(i) {
    const { series } = this.sequence;
    const rows = Object.entries(series).flatMap(([key, s]) => [make("dt", { class: key === this.key ? "now" : null }, s.name), make("dd", { class: key === this.key ? "now" : null }, quantity(this.readers[key](i), s.unit, 2))]);
    const kinds = ["sink", "anchor", "opens a chunk"].filter((_, k) => this.marks[k].has(i));
    return [make("b", {}, "“" + visible(this.words[i]) + "”"), " position " + number(i) + (kinds.length ? ", " + kinds.join(", ") : ""), make("dl", {}, rows)];
  }

  hover(event) {
    const span = event.target.closest?.(".t");
    if (span) showTip(this.facts(span.i), event.clientX, event.clientY);
  }

  find(i) {
    const part = this.parts.find((one) => i >= one.from && i < one.to);
    this.build(part);
    return part.children[i - part.from];
  }

  select(i) {
    const old = this.at;
    this.at = i;
    const shade = this.shader();
    if (old >= 0) { const span = this.find(old); span.className = this.css(old, shade); }
    const span = this.find(i);
    span.className = this.css(i, shade);
    span.scrollIntoView({ block: "nearest" });
    const box = span.getBoundingClientRect();
    showTip(this.facts(i), box.left, box.bottom);
    say(visible(this.words[i]) + ", " + quantity(this.readers.received(i), "share", 2) + " received");
  }

  reveal(i) {
    i = Math.min(this.words.length - 1, Math.max(0, i));
    const span = this.find(i);
    this.box.scrollTop += span.getBoundingClientRect().top - this.box.getBoundingClientRect().top - 60;
    this.map();
  }

  map() {
    const canvas = this.canvas;
    if (!canvas || !canvas.clientWidth) return;
    const density = Math.min(devicePixelRatio || 1, 2), width = Math.round(canvas.clientWidth * density), height = 44 * density;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d"), shade = this.shader(), count = this.words.length;
    context.fillStyle = colour("--accent");
    const step = density * 2, bars = Math.floor(width / step);
    for (let b = 0; b < bars; b++) {
      const from = Math.floor((b * count) / bars), to = Math.max(from + 1, Math.floor(((b + 1) * count) / bars));
      let sum = 0, most = 0;
      for (let i = from; i < to; i++) { const v = shade(i); sum += v; if (v > most) most = v; }
      const y = 0.5 * (sum / (to - from) + most) * (height - 12 * density);
      context.globalAlpha = 0.85;
      context.fillRect(b * step, height - y, step - density * 0.5, y);
    }
    context.globalAlpha = 1;
    context.fillStyle = colour("--ink");
    for (const i of this.marks[0]) context.fillRect(((i + 0.5) / count) * width - 3 * density + (i ? 0 : 3 * density), 2 * density, 6 * density, 6 * density);
    const shown = this.parts.filter((part) => part.offsetTop + part.offsetHeight > this.box.scrollTop && part.offsetTop < this.box.scrollTop + this.box.clientHeight);
    if (shown.length) {
      const first = shown[0], last = shown[shown.length - 1];
      const inside = (part, y) => part.from + (part.to - part.from) * Math.min(1, Math.max(0, (y - part.offsetTop) / part.offsetHeight));
      const a = inside(first, this.box.scrollTop), b = inside(last, this.box.scrollTop + this.box.clientHeight);
      context.strokeStyle = colour("--warm");
      context.lineWidth = 1.5 * density;
      context.strokeRect((a / count) * width + density, density, Math.max(((b - a) / count) * width - 2 * density, 4 * density), height - 2 * density);
    }
  }
}

// ---- rhythm

class Rhythm {
  constructor(stack, index) {
    this.section = document.getElementById(index ? "rhythm-" + index : "rhythm");
    this.ok = !!(this.section && stack.sequence?.series.waad && stack.sequence.series.fai);
    if (!this.ok) return;
    this.sequence = stack.sequence;
    this.waad = reader(this.sequence.series.waad);
    this.fai = reader(this.sequence.series.fai);
    this.count = this.sequence.count;
    this.over = $(".rhythm-over", this.section);
    this.brush = $(".brush", this.section);
    this.detail = $(".rhythm-detail", this.section);
    this.start = 0;
    this.anchors = new Set(this.sequence.anchors);
    this.peaks = new Set(this.sequence.peaks);
    let grip = null;
    const move = (event) => {
      const box = this.over.getBoundingClientRect(), wide = box.width - 58;
      const token = ((event.clientX - box.left - 46) / wide) * this.count;
      this.go(token - grip);
    };
    this.over.addEventListener("pointerdown", (event) => {
      if (event.target.closest("a,summary")) return;
      const box = this.over.getBoundingClientRect();
      const token = ((event.clientX - box.left - 46) / (box.width - 58)) * this.count;
      const inside = token >= this.start && token <= this.start + this.size;
      grip = inside ? token - this.start : this.size / 2;
      this.over.setPointerCapture(event.pointerId);
      move(event);
    });
    this.over.addEventListener("pointermove", (event) => { if (grip !== null) move(event); });
    this.over.addEventListener("pointerup", () => { grip = null; });
    this.over.addEventListener("pointercancel", () => { grip = null; });
    this.brush.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 0.25, ArrowLeft: -0.25, PageDown: 1, PageUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.go(this.start + step * this.size);
    });
    new ResizeObserver(() => this.go(this.start)).observe(this.over);
  }

  go(start) {
    const wide = this.over.clientWidth;
    this.size = Math.min(this.count, wide > 900 ? 84 : wide > 560 ? 50 : 24);
    this.start = Math.round(Math.min(this.count - this.size, Math.max(0, start)));
    const share = (wide - 58) / this.count;
    this.brush.style.left = 46 + this.start * share + "px";
    this.brush.style.width = Math.max(8, this.size * share) + "px";
    this.brush.setAttribute("aria-valuenow", this.start);
    this.brush.setAttribute("aria-valuetext", "tokens " + this.start + " to " + (this.start + this.size));
    this.draw();
  }

  draw() {
    const { start, size, sequence } = this, column = 100 / size, nodes = [];
    const low = sequence.series.fai.shade[0], high = sequence.series.fai.high;
    const points = [];
    for (let k = 0; k < size; k++) {
      const i = start + k, x = (k + 0.5) * column, word = visible(sequence.tokens[i] ?? String(i));
      const fai = this.fai(i), tall = 60 * place(fai ?? 0, low, high, "log"), waad = 74 - 6 * (this.waad(i) ?? 0);
      points.push(x + " " + waad);
      nodes.push(make("rect", { class: "fai", x: x - 0.36 * column + "%", width: 0.72 * column + "%", y: 150 - tall, height: Math.max(tall, 0.5) }));
      if (this.peaks.has(i)) nodes.push(shape("peak", x, waad - 8));
      if (this.anchors.has(i)) nodes.push(shape("anchor", x, 150 - tall - 8));
      const label = make("text", { class: "word" + (this.anchors.has(i) ? " hot" : ""), x: 0, y: 0 }, word.length > 9 ? word.slice(0, 8) + "…" : word);
      const turned = make("svg", { x: x + "%", y: 158, overflow: "visible" }, label);
      label.setAttribute("transform", "rotate(90) translate(0 4)");
      nodes.push(turned, make("rect", { class: "hit", x: k * column + "%", width: column + "%", y: 0, height: 222, "data-tip": "“" + word + "” " + number(i) + ": WAAD " + number(this.waad(i)) + ", FAI " + quantity(fai, "share", 2) }));
    }
    const line = make("svg", { class: "stretch", viewBox: "0 0 100 80", width: "100%", height: 80, preserveAspectRatio: "none" }, make("path", { class: "waad", d: "M" + points.join("L") }));
    const axes = [14, 74, 150].map((y) => make("line", { class: "grid", x1: 0, x2: "100%", y1: y, y2: y }));
    const names = [["WAAD 10", 18], ["0", 78], ["FAI", 150]].map(([name, y]) => make("text", { class: "tick end", x: 0, dx: -8, y }, name));
    this.detail.replaceChildren(make("svg", { class: "chart", height: 224, role: "img", "aria-label": "WAAD and FAI of tokens " + start + " to " + (start + size) },
      make("svg", { class: "plot", width: "100%" }, axes, names, line, nodes)));
  }
}

function shape(kind, x, y) {
  const d = kind === "anchor" ? "M0-5L5 4H-5Z" : "M0-5L5 0L0 5L-5 0Z";
  return make("svg", { x: x + "%", y, overflow: "visible" }, make("path", { class: "shape " + kind, d }));
}

// ---- kept positions

class Kept {
  constructor(stack, index) {
    this.section = document.getElementById(index ? "budget-" + index : "budget");
    this.ok = !!(this.section && stack.budget.length);
    if (!this.ok) return;
    this.stack = stack;
    this.canvas = $(".kept", this.section);
    this.level = 0;
    radios($("[role=radiogroup]", this.section), (data) => { this.level = +data.budget; this.draw(); });
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect(), { bins, kept } = stack.budget[this.level];
      const layer = Math.min(stack.layers - 1, Math.floor(((event.clientY - box.top) / box.height) * stack.layers));
      const bin = Math.min(bins - 1, Math.floor(((event.clientX - box.left) / box.width) * bins));
      const share = bytes[kept.at + layer * bins + bin] / kept.steps, width = stack.sequence.count / bins;
      this.canvas.dataset.tip = "layer " + layer + ", tokens " + Math.floor(bin * width) + " to " + (Math.ceil((bin + 1) * width) - 1) + ": about " + quantity(share, "share", 2) + " kept";
    });
    this.draw();
  }

  draw() {
    const { bins, kept } = this.stack.budget[this.level], { layers } = this.stack, size = Math.max(3, Math.min(8, Math.floor(170 / layers)));
    this.canvas.width = bins;
    this.canvas.height = layers;
    this.canvas.style.height = layers * size + "px";
    this.canvas.style.imageRendering = "pixelated";
    const context = this.canvas.getContext("2d"), image = context.createImageData(bins, layers);
    for (let i = 0; i < bins * layers; i++) image.data.set([...palette[Math.round((Math.min(bytes[kept.at + i], kept.steps) / kept.steps) * 29)], 255], 4 * i);
    context.putImageData(image, 0, 0);
  }
}

// ---- links, keys, theme, downloads

function setHash(hash) {
  try { history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search); } catch { /* a page inside a frame */ }
}

function follow(hash, start) {
  const parts = decodeURIComponent(hash.replace(/^#/, "")).split("&");
  let wanted = null;
  for (const part of parts) {
    const [, stack = "", name] = /^(?:(.*)\.)?(L\d+H\d+)$/i.exec(part) || [];
    if (part.startsWith("measure=")) {
      for (const atlas of atlases) if (atlas.ok && atlas.show(part.slice(8))) wanted = wanted || { atlas };
    } else if (name) {
      const atlas = atlases.find((one) => one.ok && one.stack.name === stack);
      const i = atlas ? atlas.index(name) : -1;
      if (i >= 0) wanted = { atlas, i };
    }
  }
  if (!wanted) return;
  if (start) wanted.atlas.section.scrollIntoView({ behavior: "instant" });
  if (wanted.i !== undefined) { wanted.atlas.focus(wanted.i); openCard(wanted.atlas, wanted.i, false, true); }
}

function switchTheme() {
  const dark = page.dataset.theme ? page.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  page.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("regard-theme", page.dataset.theme); } catch { /* storage is off */ }
  repaint();
}

function repaint() {
  readPalette();
  mapCache.clear();
  for (const one of [...atlases, ...texts, ...keeps]) if (one.ok) { (one.drawPatterns || one.map || one.draw).call(one); one.drawMatrix?.(); }
  if (opened) openCard(opened.atlas, opened.i, false, true);
}

function copy(text, button) {
  const done = () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1400); };
  const old = () => {
    const area = make("textarea", {}, text);
    document.body.append(area);
    area.select();
    try { document.execCommand("copy"); done(); } finally { area.remove(); }
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, old);
  else old();
}

function download(kind) {
  const rows = [];
  if (kind === "csv") {
    rows.push("stack,layer,head,measure,value,se");
    for (const stack of data.stacks) for (const m of stack.measures) m.values.forEach((v, i) => {
      if (v !== null) rows.push([stack.name, Math.floor(i / stack.heads), i % stack.heads, m.key, v, m.error?.[i] ?? ""].join(","));
    });
  } else {
    const stacks = data.stacks.map((stack) => ({
      name: stack.name, label: stack.label, layers: stack.layers, heads: stack.heads,
      measures: stack.measures,
      tokens: stack.sequence?.tokens,
      series: stack.sequence && Object.fromEntries(Object.entries(stack.sequence.series).map(([key, packed]) => {
        const read = reader(packed);
        return [key, Array.from({ length: packed.size }, (_, i) => { const v = read(i); return v === null ? null : +v.toPrecision(3); })];
      })),
      sinks: stack.sequence?.sinks, anchors: stack.sequence?.anchors, peaks: stack.sequence?.peaks,
    }));
    rows.push(JSON.stringify({ ...data, stacks }));
  }
  const url = URL.createObjectURL(new Blob([rows.join("\n")], { type: kind === "csv" ? "text/csv" : "application/json" }));
  const name = data.model.split("/").pop().replace(/[^\w.-]+/g, "_") || "report";
  const link = make("a", { href: url, download: name + "-attention." + kind });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (!button) {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && /L\d+H\d+$/.test(link.hash)) { event.preventDefault(); follow(link.hash); setHash(link.hash.slice(1)); }
    return;
  }
  if (button.dataset.copy !== undefined) copy(button.dataset.copy, button);
  else if (button.dataset.download) download(button.dataset.download);
  else if (button.dataset.heads !== undefined) {
    const atlas = atlases.find((one) => one.ok);
    if (!atlas) return;
    if (button.dataset.measure) atlas.show(button.dataset.measure);
    atlas.mark(button.dataset.heads.split(" "));
    atlas.section.scrollIntoView();
  } else if (button.id === "theme") switchTheme();
  else if (button.id === "help-open") $("#help").showModal();
  else if (button.closest("#help")) $("#help").close();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input,textarea,select")) return;
  const atlas = opened?.atlas || atlases.find((one) => one.ok);
  if (event.key === "Escape") {
    hideTip();
    if ($("#help").open) return;
    if (opened) closeCard(true);
    else atlases.forEach((one) => one.ok && one.lit && one.mark(null));
  } else if (event.key === "j") stepCard(1);
  else if (event.key === "k") stepCard(-1);
  else if (event.key === "?") $("#help").showModal();
  else if (event.key === "d") switchTheme();
  else if (event.key === "p") atlas?.patterns();
  else if (event.key.toLowerCase() === "m" && atlas) {
    const { measures } = atlas.stack, at = measures.indexOf(atlas.measure) + (event.key === "m" ? 1 : -1);
    atlas.show(measures[(at + measures.length) % measures.length].key, true);
  }
});

addEventListener("beforeprint", () => $$(".definitions details").forEach((one) => { one.open = true; }));
addEventListener("afterprint", () => $$(".definitions details").forEach((one) => { one.open = false; }));

let data, atlases = [], texts = [], rhythms = [], keeps = [];
try { const theme = localStorage.getItem("regard-theme"); if (theme) page.dataset.theme = theme; } catch { /* storage is off */ }

async function start() {
  const [values, block] = await Promise.all([unpack("regard-values"), unpack("regard-bytes")]);
  data = JSON.parse(new TextDecoder().decode(values));
  bytes = block;
  readPalette();
  const each = (Kind) => data.stacks.map((stack, i) => new Kind(stack, i));
  atlases = each(Atlas);
  follow(location.hash, true);
  await new Promise((next) => setTimeout(next));
  texts = each(Text);
  rhythms = each(Rhythm);
  keeps = each(Kept);
  addEventListener("hashchange", () => follow(location.hash));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (!page.dataset.theme) repaint(); });
  const links = new Map($$(".top nav a").map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.get(entry.target.id);
      if (!link || !entry.isIntersecting) continue;
      links.forEach((other) => other.removeAttribute("aria-current"));
      link.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-30% 0px -60% 0px" });
  $$("section[id]").forEach((section) => watch.observe(section));
  page.dataset.ready = "true";
  performance.mark("regard-ready");
}
start().catch((error) => {
  page.classList.remove("js");
  console.error("regard: the page's numbers could not be read", error);
});
})();
