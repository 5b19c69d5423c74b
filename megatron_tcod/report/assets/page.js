// Puts the page together: the sentence at the top, chips, switches, charts.
const SIGNALS = [
  ["kl/token", "KL a token", "nats"], ["entropy/student", "Student entropy", "nats a token"], ["turns/student", "Student turns", "an episode"],
  ["tokens/generated", "Tokens sampled", "a step"], ["train/loss", "Loss", ""], ["train/grad_norm", "Gradient norm", "before clipping"],
  ["logprob/rollout_gap", "Engine against trainer", "mean |log p difference|"],
];

const stepAxis = { label: "step", format: (value) => `${+value.toPrecision(6)}`, whole: true };
const wallAxis = () => {
  const longest = Math.max(...RUNS.map((run) => run.headline.wall || 0));
  const [unit, size] = longest > 5400 ? ["hours", 3600] : longest > 150 ? ["minutes", 60] : ["seconds", 1];
  return { label: `training time, ${unit}`, unit, size, format: (value) => `${+value.toPrecision(4)}` };
};

const xAxis = () => (state.x === "wall" ? wallAxis() : stepAxis);
const xOf = (source) => (state.x === "wall" ? source.wall.map((seconds) => seconds / wallAxis().size) : source.step);

function curve(key, options) {
  return () => ({
    series: visible().filter(({ run }) => run.curves.values[key]).map(({ run, index }) => {
      const x = xOf(run.curves);
      return { index, name: run.name, points: run.curves.values[key].map((y, i) => [x[i], y]), smooth: true };
    }),
    x: xAxis(), ...options(),
  });
}

function heldOut() {
  return {
    series: visible().filter(({ run }) => run.evaluations.length).map(({ run, index }, place, all) => {
      const x = xOf({ step: run.evaluations.map((point) => point.step), wall: run.evaluations.map((point) => point.wall) });
      return { index, name: run.name, marks: true, shift: (place - (all.length - 1) / 2) * 5, points: run.evaluations.map((point, i) => [x[i], point.success]), whiskers: run.evaluations.map((point) => point.interval) };
    }),
    x: xAxis(), y: { format: (value) => `${Math.round(100 * value)}%`, exact: percent, from: 0, to: 1 }, missing: "No run was evaluated.", label: "Held-out success",
  };
}

function heldOutKl() {
  return {
    series: visible().filter(({ run }) => run.held_out_kl.length).map(({ run, index }) => ({ index, name: run.name, points: run.held_out_kl.map((y, turn) => [turn, y]) })),
    x: { ...stepAxis, label: "turn" }, y: { label: "nats", format: short, log: state.y === "log", from: 0 }, missing: "No evaluation recorded KL by turn.", label: "Held-out KL by turn",
  };
}

function wallClock() {
  const axis = wallAxis();
  return {
    series: visible().filter(({ run }) => run.curves.wall).map(({ run, index }) => ({ index, name: run.name, points: run.curves.step.map((step, i) => [step, run.curves.wall[i] / axis.size]) })),
    x: stepAxis, y: { label: axis.unit, format: short, exact: (value) => duration(value * axis.size), from: 0 }, missing: "Steps were not timed.", label: "Cumulative wall-clock",
  };
}

function lede() {
  const evaluated = RUNS.map((run, index) => ({ run, index })).filter(({ run }) => run.headline.held_out);
  const steps = RUNS.map((run) => run.headline.steps);
  const fewest = Math.min(...steps), most = Math.max(...steps);
  const scope = `${count(RUNS.length, "run")}, ${fewest === most ? count(most, "step") : `${fewest} to ${most} steps`}.`;
  if (!evaluated.length) return `${scope} No held-out evaluation yet.`;
  const ranked = [...evaluated].sort((a, b) => b.run.headline.held_out.success - a.run.headline.held_out.success);
  const best = ranked[0], held = best.run.headline.held_out;
  const result = `${RUNS.length > 1 ? `Highest held-out success: ${best.run.name}, ` : "Held-out success: "}${percent(held.success)} of ${held.tasks} tasks (95% interval ${percent(held.interval[0])} to ${percent(held.interval[1])}).`;
  const shown = DATA.pairs.filter((pair) => pair.p < 0.05).length;
  const caution = DATA.pairs.length ? ` ${shown} of ${count(DATA.pairs.length, "pair")} of runs ${shown === 1 ? "differs" : "differ"} at p < 0.05.` : "";
  return `${scope} ${result}${caution}`;
}

function drawChips() {
  fill("chips", ...RUNS.map((run, index) => {
    const chip = el("button.chip", dot(index), run.name);
    chip.type = "button";
    chip.title = "Show or hide this run";
    chip.setAttribute("aria-pressed", `${!state.hidden.has(index)}`);
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(index) && state.hidden.size < RUNS.length - 1) state.hidden.add(index);
      redraw();
    });
    return chip;
  }));
}

function setUpSwitch(id, key) {
  const buttons = [...find(id).querySelectorAll("button")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      state[key] = button.dataset.value;
      for (const other of buttons) other.setAttribute("aria-pressed", `${other === button}`);
      redraw();
    });
  }
  return buttons;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  find("theme").textContent = name === "dark" ? "Light" : "Dark";
}

function setUpTheme() {
  const wish = matchMedia("(prefers-color-scheme: dark)");
  setTheme(wish.matches ? "dark" : "light");
  wish.addEventListener("change", () => { setTheme(wish.matches ? "dark" : "light"); redraw(); });
  find("theme").addEventListener("click", () => { setTheme(theme() === "dark" ? "light" : "dark"); redraw(); });
  let before = null; // paper is white
  addEventListener("beforeprint", () => { before = theme(); setTheme("light"); redraw(); });
  addEventListener("afterprint", () => { setTheme(before || theme()); redraw(); });
}

function start() {
  setUpTheme();
  find("lede").textContent = lede();
  const axisButtons = setUpSwitch("switch-x", "x");
  if (!hasWall) Object.assign(axisButtons[1], { disabled: true, title: "Steps were not timed in every run" });
  setUpSwitch("switch-y", "y");
  setUpSwitch("switch-heat", "heat");
  for (const draw of [drawChips, drawHeadline, drawPairs, drawFamilies, drawNotes, drawPhases, drawTokens, drawOutcomes, drawHeatmaps]) {
    drawings.push(draw);
    draw();
  }
  chart("chart-held-out", heldOut);
  chart("chart-rollout", curve("rollout/success", () => ({ y: { format: (value) => `${Math.round(100 * value)}%`, exact: percent, from: 0, to: 1 }, label: "Rollout success" })));
  chart("chart-kl", curve("kl/trajectory", () => ({ y: { label: "nats", format: short, log: state.y === "log", from: 0 }, label: "Trajectory KL" })));
  chart("chart-held-out-kl", heldOutKl);
  chart("chart-wall", wallClock);
  for (const [key, name, unit] of SIGNALS.filter(([key]) => RUNS.some((run) => run.curves.values[key]))) {
    const box = el("div.chart");
    box.id = `signal-${key.replace("/", "-")}`;
    find("signals").append(el("figure", el("figcaption", el("b", name), unit), box));
    chart(box.id, curve(key, () => ({ y: { format: short, from: 0 }, height: 170, label: name })));
  }
  if (!find("signals").childNodes.length) fill("signals", empty("Not recorded."));
  drawSettings();
  setUpReader();
  let pending = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(pending);
    pending = setTimeout(redraw, 120);
  });
}

start();
