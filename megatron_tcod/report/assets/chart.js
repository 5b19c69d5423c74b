// Line charts: chart("id", () => spec) draws now and whenever something changes.
// spec: { series: [{ index, name, points: [[x, y]], smooth, marks, whiskers: [[low, high]], shift }], x: { label, format, whole },
//         y: { label, format, exact, log, from, to }, height, label, missing }; shift moves a series by pixels so that marks do not hide each other.

function chart(id, describe) {
  const box = find(id);
  const draw = () => drawChart(box, describe());
  drawings.push(draw);
  draw();
}

function drawChart(box, spec) {
  const series = spec.series.map((one) => ({ ...one, points: one.points.map(([x, y]) => [x, spec.y.log && y <= 0 ? null : y]) }));
  const known = series.flatMap((one) => one.points.filter(([, y]) => y !== null));
  if (!known.length) return box.replaceChildren(empty(spec.missing || "Not recorded."));
  const width = Math.max(240, box.clientWidth), height = spec.height || 250;
  const frame = { left: spec.y.label ? 58 : 48, right: width - 12, top: 10, bottom: height - 36 };
  const x = scaleOf(spread(known.map((point) => point[0])), [frame.left, frame.right], false);
  const reach = series.flatMap((one) => (one.whiskers || []).flat());
  const y = scaleOf(verticalRange(known.map((point) => point[1]).concat(reach), spec.y), [frame.bottom, frame.top], spec.y.log);
  const svg = shape("svg", { width, height, role: "img", "aria-label": spec.label || "chart" });
  drawAxes(svg, frame, x, y, spec);
  for (const one of series) drawSeries(svg, one, x, y);
  addCursor(svg, frame, series, x, y, spec);
  box.replaceChildren(svg);
}

function spread(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function verticalRange(values, axis) {
  if (axis.log) {
    const positive = values.filter((value) => value > 0);
    return [Math.min(...positive) / 1.15, Math.max(...positive) * 1.15];
  }
  const low = Math.min(...values, axis.from ?? Infinity), high = Math.max(...values, axis.to ?? -Infinity);
  if (low === high) return low === 0 ? [0, 1] : spread([low, high]);
  return [low, axis.to !== undefined ? high : high + (high - low) * 0.06];
}

function scaleOf([low, high], [start, end], log) {
  const by = log ? Math.log10 : (value) => value;
  const place = (value) => start + ((by(value) - by(low)) / (by(high) - by(low))) * (end - start);
  return Object.assign(place, { low, high, ticks: (count) => (log ? logTicks(low, high) : niceTicks(low, high, count)) });
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low), ticks = [];
  const factors = decades > 3 ? [1] : decades > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of factors) {
      const tick = +(factor * 10 ** power).toPrecision(12);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

function drawAxes(svg, frame, x, y, spec) {
  for (const tick of y.ticks(spec.height && spec.height < 200 ? 3 : 5)) {
    svg.append(shape("line", { class: "grid", x1: frame.left, x2: frame.right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: frame.left - 8, y: y(tick) + 4, "text-anchor": "end" }, spec.y.format(tick)));
  }
  svg.append(shape("line", { class: "axis", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }));
  if (spec.y.label) svg.append(shape("text", { transform: `translate(11 ${(frame.top + frame.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, spec.y.label));
  const whole = spec.x.whole;
  for (const tick of x.ticks(Math.max(3, Math.round((frame.right - frame.left) / 90))).filter((tick) => !whole || Number.isInteger(tick))) {
    svg.append(shape("text", { x: x(tick), y: frame.bottom + 16, "text-anchor": "middle" }, spec.x.format(tick)));
  }
  svg.append(shape("text", { x: (frame.left + frame.right) / 2, y: frame.bottom + 32, "text-anchor": "middle" }, spec.x.label));
}

function pathOf(points, x, y, shift) {
  let path = "", isDown = false;
  for (const [px, py] of points) {
    if (py !== null) path += `${isDown ? "L" : "M"}${(x(px) + shift).toFixed(1)} ${y(py).toFixed(1)}`;
    isDown = py !== null;
  }
  return path;
}

function drawSeries(svg, one, x, y) {
  const stroke = colour(one.index), shift = one.shift || 0;
  const line = (points, kind) => svg.append(painted(shape("path", { class: kind, d: pathOf(points, x, y, shift) }), "stroke", stroke));
  if (one.smooth && one.points.length > 8) {
    line(one.points, "line raw");
    line(runningMean(one.points), "line");
  } else {
    line(one.points, "line");
  }
  (one.whiskers || []).forEach(([low, high], i) => {
    const at = x(one.points[i][0]) + shift;
    svg.append(painted(shape("line", { class: "whisker", x1: at, x2: at, y1: y(low), y2: y(high) }), "stroke", stroke));
  });
  if (one.marks || one.points.length === 1) {
    for (const [px, py] of one.points.filter(([, value]) => value !== null)) {
      svg.append(painted(shape("circle", { class: "point", cx: x(px) + shift, cy: y(py), r: 4 }), "fill", stroke));
    }
  }
}

// Mean over a centred window of about a twelfth of the points.
function runningMean(points) {
  const reach = Math.max(1, Math.round(points.length / 24));
  return points.map(([px], i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1).map((point) => point[1]).filter((value) => value !== null);
    return [px, near.length ? near.reduce((sum, value) => sum + value, 0) / near.length : null];
  });
}

function addCursor(svg, frame, series, x, y, spec) {
  const cursor = shape("line", { class: "cursor", y1: frame.top, y2: frame.bottom, visibility: "hidden" });
  const area = shape("rect", { x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top, fill: "transparent" });
  svg.append(cursor, area);
  area.addEventListener("pointermove", (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const nearest = series.map((one) => ({ one, point: closest(one.points, at, x) })).filter(({ point }) => point);
    if (!nearest.length) return;
    const anchor = nearest.map(({ point }) => point[0]).reduce((a, b) => (Math.abs(x(a) - at) <= Math.abs(x(b) - at) ? a : b));
    cursor.setAttribute("x1", x(anchor));
    cursor.setAttribute("x2", x(anchor));
    cursor.setAttribute("visibility", "visible");
    const near = nearest.filter(({ point }) => Math.abs(x(point[0]) - x(anchor)) < 12);
    const rows = near.map(({ one, point }) => tipRow(one.index, one.name, describePoint(one, point, spec)));
    showTip(event.clientX, event.clientY, el("b", `${spec.x.label} ${spec.x.format(anchor)}`), ...rows);
  });
  area.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    hideTip();
  });
}

function describePoint(one, point, spec) {
  const format = spec.y.exact || spec.y.format, index = one.points.indexOf(point);
  const range = one.whiskers ? ` [${format(one.whiskers[index][0])}, ${format(one.whiskers[index][1])}]` : "";
  return format(point[1]) + range;
}

function closest(points, at, x) {
  let best = null;
  for (const point of points) {
    if (point[1] !== null && (best === null || Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at))) best = point;
  }
  return best;
}
