// The comparison, notes, costs and settings.

function table(head, rows) {
  return el("table", el("thead", el("tr", ...head)), el("tbody", ...rows.map((cells) => el("tr", ...cells))));
}

const heading = (text, small) => el("th", text, small ? el("small", small) : null);
const named = (index) => el("td.wrap", dot(index), RUNS[index].name);
const cell = (text, small) => el("td", text, small ? el("small", ` ${small}`) : null);

// A dot with its interval on a line from 0 to 100%.
function intervalMark(index, success, [low, high]) {
  const width = 150, at = (share) => 4 + share * (width - 8);
  const svg = shape("svg", { width, height: 18, role: "img", "aria-label": `${percent(success)}, 95% interval ${percent(low)} to ${percent(high)}` });
  svg.append(shape("line", { class: "grid", x1: at(0), x2: at(1), y1: 9, y2: 9 }));
  for (const tick of [0, 0.5, 1]) svg.append(shape("line", { class: "axis", x1: at(tick), x2: at(tick), y1: 5, y2: 13 }));
  svg.append(painted(shape("line", { x1: at(low), x2: at(high), y1: 9, y2: 9, "stroke-width": 4, "stroke-linecap": "round", opacity: 0.4 }), "stroke", colour(index)));
  svg.append(painted(shape("circle", { class: "point", cx: at(success), cy: 9, r: 5 }), "fill", colour(index)));
  return svg;
}

function drawHeadline() {
  const head = [heading("Run"), heading("Held-out success", "solved of played"), heading("95% interval", "Wilson"), heading("", "0 to 100%"), heading("Turns", "mean"),
    heading("Trajectory KL", "held-out"), heading("Trajectory KL", "last steps"), heading("Steps"), heading("Wall-clock"), heading("Generated", "tokens"), heading("Trained", "tokens")];
  const rows = visible().map(({ run, index }) => {
    const row = run.headline, held = row.held_out, name = named(index);
    if (row.curriculum && !run.name.includes(row.curriculum)) name.append(el("small", ` ${row.curriculum}`));
    const result = held
      ? [el("td", el("span.big", percent(held.success)), el("small", ` ${held.solved}/${held.tasks}`)), cell(`${percent(held.interval[0])} – ${percent(held.interval[1])}`), el("td", intervalMark(index, held.success, held.interval)), cell(short(held.turns)), cell(short(held.kl))]
      : [el("td.muted", "not evaluated"), cell("–"), cell(""), cell("–"), cell("–")];
    return [name, ...result, cell(short(row.train_kl)), cell(`${row.steps}`), cell(duration(row.wall)), cell(short(row.generated)), cell(short(row.trained))];
  });
  fill("headline", table(head, rows));
}

function pValue(p) {
  return p < 0.001 ? "p < 0.001" : `p = ${p.toPrecision(2)}`;
}

function drawPairs() {
  const pairs = DATA.pairs.filter(({ a, b }) => !state.hidden.has(a) && !state.hidden.has(b));
  if (!pairs.length) return fill("pairs", empty("Needs two runs that were evaluated on common tasks."));
  const rows = pairs.map((pair) => {
    const ahead = pair.only_a > pair.only_b ? pair.a : pair.b;
    const verdict = pair.p < 0.05 ? el("span.ahead", `${RUNS[ahead].name} is ahead`) : el("span.muted", "no difference shown");
    return [el("td.wrap", dot(pair.a), RUNS[pair.a].name, el("br"), dot(pair.b), RUNS[pair.b].name), cell(`${pair.only_a}`), cell(`${pair.only_b}`), cell(`${pair.both}`), cell(`${pair.neither}`), el("td", pValue(pair.p), el("br"), verdict)];
  });
  const head = [heading("Pair"), heading("Only first", "solves"), heading("Only second", "solves"), heading("Both"), heading("Neither"), heading("McNemar", "exact, two-sided")];
  fill("pairs", table(head, rows));
}

function drawFamilies() {
  const shown = visible().filter(({ run }) => Object.keys(run.families).length);
  const names = [...new Set(shown.flatMap(({ run }) => Object.keys(run.families)))].sort();
  if (!names.length) return fill("families", empty("No evaluation."));
  const rows = names.map((name) => [el("td.wrap", name), ...shown.map(({ run, index }) => {
    const [solved, played] = run.families[name] || [0, 0];
    if (!played) return cell("–");
    const label = el("span.family", `${solved}/${played}`);
    return el("td", painted(label, "background", `color-mix(in srgb, ${colour(index)} ${Math.round((55 * solved) / played)}%, transparent)`));
  })]);
  fill("families", table([heading("Family"), ...shown.map(({ run, index }) => el("th", dot(index), ` ${run.name}`))], rows));
}

function drawNotes() {
  const items = DATA.notes.filter((note) => note.run === null || !state.hidden.has(note.run)).map((note) => {
    const item = el(`li.${note.level}`);
    if (note.run !== null) item.append(el("b", RUNS[note.run].name));
    item.append(note.text);
    return item;
  });
  fill("notes", ...(items.length ? items : [el("li", "Nothing odd was found in the records.")]));
}

function drawPhases() {
  const shown = visible().filter(({ run }) => Object.keys(run.costs.phases).length);
  if (!shown.length) return fill("phases", empty("Steps were not timed."));
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.costs.phases)))].sort((a, b) => (a === "other") - (b === "other"));
  const paint = (name) => (name === "other" ? "var(--phase5)" : `var(--phase${names.indexOf(name) % 5})`);
  const sum = (run) => Object.values(run.costs.phases).reduce((total, seconds) => total + seconds, 0);
  const longest = Math.max(...shown.map(({ run }) => sum(run)));
  const bars = shown.map(({ run, index }) => {
    const stack = el("div.stack", ...names.filter((name) => run.costs.phases[name]).map((name) => {
      const part = painted(painted(el("i"), "background", paint(name)), "width", `${(100 * run.costs.phases[name]) / longest}%`);
      part.addEventListener("pointermove", (event) => showTip(event.clientX, event.clientY, el("b", name), `${duration(run.costs.phases[name])}, ${percent(run.costs.phases[name] / sum(run))}`));
      part.addEventListener("pointerleave", hideTip);
      return part;
    }));
    return el("div", el("div.bar-name", el("span", dot(index), ` ${run.name}`), el("span", duration(sum(run)))), stack);
  });
  const legend = names.map((name) => el("span", painted(el("span.dot"), "background", paint(name)), name));
  fill("phases", el("div.bars", ...bars), el("div.legend", ...legend));
}

const TOKEN_KINDS = { generated: "sampled by the student", trained: "with a loss", packed: "through the student in training", prompt: "in prompts", cached: "of those, from the KV cache" };

function drawTokens() {
  const shown = visible();
  const kinds = Object.keys(TOKEN_KINDS).filter((kind) => shown.some(({ run }) => run.costs.tokens[kind] !== undefined));
  if (!kinds.length) return fill("tokens", empty("Not recorded."));
  fill("tokens", el("div.bars", ...kinds.map((kind) => {
    const most = Math.max(...shown.map(({ run }) => run.costs.tokens[kind] || 0), 1);
    const bars = shown.map(({ run, index }) => {
      const bar = painted(painted(el("i"), "background", colour(index)), "width", `${(84 * (run.costs.tokens[kind] || 0)) / most}%`);
      return el("div.amount", bar, el("span", short(run.costs.tokens[kind])));
    });
    return el("div", el("div.bar-name", el("span", `${kind} `, el("span.muted", TOKEN_KINDS[kind]))), ...bars);
  })));
}

function drawOutcomes() {
  const shown = visible();
  const names = [...new Set(shown.flatMap(({ run }) => Object.keys(run.outcomes)))].sort((a, b) => b.startsWith("outcome") - a.startsWith("outcome") || a.localeCompare(b));
  if (!names.length) return fill("outcomes", empty("Not recorded."));
  const rows = names.map((name) => [el("td", name.replace("outcome/", "outcome: ").replace("end/", "ended by: ")), ...shown.map(({ run }) => cell((run.outcomes[name] || 0).toLocaleString("en")))]);
  fill("outcomes", table([heading("Episodes"), ...shown.map(({ run, index }) => el("th", dot(index), ` ${run.name}`))], rows));
}

function drawSettings() {
  const rows = DATA.differences.map((row) => [el("td", el("code", row.key)), ...row.values.map((value) => el("td.wrap", value || "–"))]);
  const heads = RUNS.map((run, index) => el("th", dot(index), ` ${run.name}`));
  const same = RUNS.length > 1 && RUNS.every((run) => run.config.length) ? empty("The settings of all runs are the same.") : null;
  fill("differences", ...(rows.length ? [table([heading("Where the runs differ"), ...heads], rows)] : same ? [same] : []));
  fill("configs", ...RUNS.map((run) => {
    const list = el("dl.config", ...run.config.flatMap(([key, value]) => [el("dt", key), el("dd", value)]));
    return el("details", el("summary", `All settings of ${run.name}`), run.config.length ? list : empty("No configuration was found."));
  }));
}
