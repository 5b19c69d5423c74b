// Turn x step heatmaps: colours on a canvas, axes and curriculum in an SVG above it.
const RAMPS = {
  light: ["#fbf3dc", "#fbd58c", "#f4a259", "#dd6a52", "#b03a63", "#6f2470", "#2f1656"],
  dark: ["#20163a", "#4c2170", "#86307a", "#c2476c", "#ec7756", "#f9b465", "#fdf0bb"],
};

const theme = () => document.documentElement.dataset.theme;

function rampColour(share) {
  const stops = RAMPS[theme()], at = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(at));
  const parts = [low, low + 1].map((i) => [1, 3, 5].map((start) => parseInt(stops[i].slice(start, start + 2), 16)));
  return parts[0].map((value, i) => Math.round(value + (parts[1][i] - value) * (at - low)));
}

// One scale for all runs: up to the 98th percentile, so that a single outlier does not fade everything else.
function heatTop() {
  const values = RUNS.filter((run) => run.heatmap).flatMap((run) => run.heatmap[state.heat].flat().filter((value) => value !== null));
  values.sort((a, b) => a - b);
  return Math.max(values[Math.floor(0.98 * (values.length - 1))] || 0, 1e-9);
}

function drawHeatmaps() {
  const shown = visible().filter(({ run }) => run.heatmap);
  if (!shown.length) {
    find("scale").replaceChildren();
    return fill("heatmaps", empty("No run recorded KL by turn."));
  }
  const top = heatTop();
  drawRamp(top);
  const box = find("heatmaps"), width = Math.max(240, box.clientWidth);
  const numTurns = Math.max(...shown.map(({ run }) => Math.max(run.heatmap.sum.length, Math.ceil(Math.max(0, ...run.heatmap.k.filter((k) => k !== null && k <= 1.5 * run.heatmap.sum.length))))));
  box.replaceChildren(...shown.map(({ run, index }) => heatmapOf(run, index, top, width, numTurns)));
}

function drawRamp(top) {
  const canvas = el("canvas"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [180, 1];
  for (let i = 0; i < 180; i += 1) {
    context.fillStyle = `rgb(${rampColour(i / 179)})`;
    context.fillRect(i, 0, 1, 1);
  }
  fill("scale", el("div.ramp", "0", canvas, `${short(top)} nats and more`, el("span.none"), "no trained token"));
}

function heatmapOf(run, index, top, width, numTurns) {
  const map = run.heatmap, rows = map[state.heat];
  const cell = Math.max(5, Math.min(22, 260 / numTurns));
  const frame = { left: 48, right: width - 12, top: 6, bottom: 6 + Math.round(cell * numTurns) };
  const canvas = el("canvas");
  [canvas.width, canvas.height] = [map.columns.length, numTurns];
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  rows.forEach((row, turn) => row.forEach((value, column) => {
    if (value === null) return;
    image.data.set([...rampColour(value / top), 255], 4 * ((numTurns - 1 - turn) * canvas.width + column));
  }));
  context.putImageData(image, 0, 0);
  Object.assign(canvas.style, { left: `${frame.left}px`, top: `${frame.top}px`, width: `${frame.right - frame.left}px`, height: `${frame.bottom - frame.top}px` });
  const svg = shape("svg", { width, height: frame.bottom + 34, role: "img", "aria-label": `KL by turn and step, ${run.name}` });
  drawHeatAxes(svg, frame, map, numTurns);
  drawCurriculum(svg, frame, map, numTurns);
  addHeatTip(svg, frame, run, numTurns);
  return el("div.heat", el("h3", dot(index), run.name), el("div.plot", canvas, svg));
}

function drawHeatAxes(svg, frame, map, numTurns) {
  const rowHeight = (frame.bottom - frame.top) / numTurns;
  for (const turn of niceTicks(0, numTurns - 1 || 1, 5).filter((tick) => Number.isInteger(tick) && tick < numTurns)) {
    svg.append(shape("text", { x: frame.left - 8, y: frame.bottom - (turn + 0.5) * rowHeight + 4, "text-anchor": "end" }, `${turn}`));
  }
  svg.append(shape("text", { transform: `translate(12 ${(frame.top + frame.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "turn"));
  const first = map.columns[0][0], last = map.columns[map.columns.length - 1][1];
  for (const step of niceTicks(first, last === first ? first + 1 : last, 8).filter((tick) => Number.isInteger(tick) && tick <= last)) {
    const column = map.columns.findIndex(([low, high]) => step >= low && step <= high);
    if (column < 0) continue;
    const x = frame.left + ((column + 0.5) / map.columns.length) * (frame.right - frame.left);
    svg.append(shape("text", { x, y: frame.bottom + 15, "text-anchor": "middle" }, `${step}`));
  }
  svg.append(shape("text", { x: (frame.left + frame.right) / 2, y: frame.bottom + 30, "text-anchor": "middle" }, "step"));
}

function stairs(values, frame, numTurns) {
  const columnWidth = (frame.right - frame.left) / values.length;
  let path = "", isDown = false;
  values.forEach((value, column) => {
    if (value !== null) {
      const y = frame.bottom - (Math.min(value, numTurns) / numTurns) * (frame.bottom - frame.top);
      const x = frame.left + column * columnWidth;
      path += `${isDown ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}L${(x + columnWidth).toFixed(1)} ${y.toFixed(1)}`;
    }
    isDown = value !== null;
  });
  return path;
}

function drawCurriculum(svg, frame, map, numTurns) {
  const depth = stairs(map.k, frame, numTurns);
  for (const [name, edge] of [["window starts", map.start], ["window stops", map.stop]]) {
    const isPlain = edge.every((value, i) => value === null || value === 0 || value >= numTurns || value === map.k[i]);
    if (isPlain) continue;
    svg.append(shape("path", { class: "depth-halo", d: stairs(edge, frame, numTurns) }));
    svg.append(shape("path", { class: "window", d: stairs(edge, frame, numTurns) }));
    tagLine(svg, frame, edge, numTurns, name, 0.3);
  }
  svg.append(shape("path", { class: "depth-halo", d: depth }), shape("path", { class: "depth", d: depth }));
  tagLine(svg, frame, map.k, numTurns, "k", 0.72);
}

// The line's name beside it, at a share of the width: above it, or below where there is no room.
function tagLine(svg, frame, values, numTurns, name, share) {
  const column = Math.floor(share * (values.length - 1));
  if (values[column] === null) return;
  const y = frame.bottom - (Math.min(values[column], numTurns) / numTurns) * (frame.bottom - frame.top);
  const x = frame.left + ((column + 0.5) / values.length) * (frame.right - frame.left);
  svg.append(shape("text", { class: "tag", x, y: y - frame.top > 16 ? y - 6 : y + 15, "text-anchor": "middle" }, name));
}

function addHeatTip(svg, frame, run, numTurns) {
  const map = run.heatmap;
  const area = shape("rect", { x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top, fill: "transparent" });
  svg.append(area);
  area.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left - frame.left) / (frame.right - frame.left)) * map.columns.length);
    const turn = Math.floor(((frame.bottom - (event.clientY - box.top)) / (frame.bottom - frame.top)) * numTurns);
    if (!map.columns[column] || turn < 0) return;
    const [low, high] = map.columns[column];
    const at = (rows) => (rows[turn] ? rows[turn][column] : null);
    showTip(event.clientX, event.clientY, el("b", `turn ${turn}, step ${low === high ? low : `${low}–${high}`}`),
      tipRow(null, "KL of the turn", short(at(map.sum))), tipRow(null, "KL a token", short(at(map.token))), tipRow(null, "depth k", short(map.k[column])),
      tipRow(null, "student plays", map.start[column] === null ? "–" : `${short(map.start[column])} to ${short(map.stop[column])}`));
  });
  area.addEventListener("pointerleave", hideTip);
}
