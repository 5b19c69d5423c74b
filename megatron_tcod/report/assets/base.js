// What the other scripts share: the data, elements made of text, numbers as people read them, the tooltip, the state.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const hasWall = RUNS.every((run) => run.curves.wall !== null);
const state = { x: "step", y: "linear", heat: "sum", hidden: new Set() };
const drawings = []; // functions that draw again when the state, the size or the theme changes

const find = (id) => document.getElementById(id);
const colour = (index) => `var(--run${index % 8})`;
const visible = () => RUNS.map((run, index) => ({ run, index })).filter(({ index }) => !state.hidden.has(index));

// el("td.left", "text", child): children that are strings become text nodes, so they are never parsed as markup.
function el(selector, ...children) {
  const [tag, ...classes] = selector.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function painted(node, property, value) {
  node.style[property] = value;
  return node;
}

const dot = (index) => painted(el("span.dot"), "background", colour(index));

// A text, or [beginning, characters left out, end] where it was clipped.
function textNodes(text) {
  if (!Array.isArray(text)) return [text];
  return [text[0], el("span.clipped", `${text[1].toLocaleString("en")} characters left out`), text[2]];
}

const plain = (text) => (Array.isArray(text) ? `${text[0]} … ${text[2]}` : text);

function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(digits)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(digits)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(digits)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(Math.max(0, digits - 2));
  return `${+value.toPrecision(digits)}`;
}

const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${+seconds.toPrecision(3)} s`;
  if (seconds < 5400) return `${Math.floor(seconds / 60)} min ${String(Math.round(seconds % 60)).padStart(2, "0")} s`;
  return `${Math.floor(seconds / 3600)} h ${String(Math.round((seconds % 3600) / 60)).padStart(2, "0")} min`;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

function fill(id, ...children) {
  find(id).replaceChildren(...children);
}

const empty = (text) => el("p.empty", text);

function redraw() {
  hideTip();
  for (const draw of drawings) draw();
}

function showTip(x, y, ...children) {
  const tip = find("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, x + 16 + width > innerWidth ? x - width - 14 : x + 16)}px`;
  tip.style.top = `${Math.max(6, y + 16 + height > innerHeight ? y - height - 14 : y + 16)}px`;
}

function hideTip() {
  find("tip").hidden = true;
}

const tipRow = (index, name, value) => el("div.row", index === null ? el("span") : dot(index), el("span", name), el("span", value));
