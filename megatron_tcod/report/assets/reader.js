// The episode reader: a list of sampled episodes, one of them open, tokens coloured by KL.
const reader = { run: 0, episode: 0 };

// One colour scale for the tokens of all runs: full colour at the 97th percentile.
const klTop = (() => {
  const values = RUNS.flatMap((run) => run.episodes.flatMap((episode) => episode.turns.flatMap((turn) => (turn.token_kl || []).filter((kl) => kl > 0))));
  values.sort((a, b) => a - b);
  return Math.max(values[Math.floor(0.97 * (values.length - 1))] || 0, 1e-6);
})();

function tokenColour(kl) {
  if (kl === null || kl === undefined) return "transparent";
  const strength = 0.8 * Math.min(1, Math.abs(kl) / klTop) ** 0.7;
  return `rgba(var(${kl < 0 ? "--kl-negative" : "--kl"}), ${strength.toFixed(3)})`;
}

function markOf(episode) {
  if (episode.outcome !== "ok") return el("span.mark-odd", "!");
  return episode.success ? el("span.mark-good", "✓") : el("span.mark-bad", "✗");
}

function drawShelf() {
  const items = [];
  RUNS[reader.run].episodes.forEach((episode, i, all) => {
    if (i === 0 || all[i - 1].step !== episode.step) items.push(el("li.step", `After ${count(episode.step, "step")}, k = ${short(episode.k)}`));
    const button = el("button", markOf(episode), el("span", plain(episode.task)), el("span.muted", short(episode.kl)));
    button.type = "button";
    button.title = plain(episode.task);
    if (i === reader.episode) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => openEpisode(reader.run, i));
    items.push(el("li", button));
  });
  fill("reader-list", ...items);
}

function openEpisode(run, index) {
  Object.assign(reader, { run, episode: index });
  find("reader-run").value = `${run}`;
  drawShelf();
  const episode = RUNS[run].episodes[index];
  fill("reader-page", ...(episode ? episodePage(episode) : [empty("This run has no episodes to read.")]));
  keepInView(find("reader-list"));
  hideTip();
}

// Scrolls the list, never the page.
function keepInView(list) {
  const current = list.querySelector('[aria-current="true"]');
  if (!current) return;
  const offset = current.getBoundingClientRect().top - list.getBoundingClientRect().top;
  if (offset < 0 || offset + current.offsetHeight > list.clientHeight) list.scrollTop += offset - list.clientHeight / 2;
}

// To the next or previous episode, on into the next run at the end.
function turnPage(direction) {
  const all = RUNS.flatMap((run, r) => run.episodes.map((_, e) => [r, e]));
  if (!all.length) return;
  const at = all.findIndex(([r, e]) => r === reader.run && e === reader.episode);
  openEpisode(...all[(at + direction + all.length) % all.length]);
  find("reader-section").scrollIntoView({ block: "start" });
}

function fact(name, ...value) {
  return el("span", `${name} `, el("b", ...value));
}

function windowText([start, stop]) {
  if (stop <= start) return "no turn";
  return stop === start + 1 ? `turn ${start}` : `turns ${start} to ${stop - 1}`;
}

function episodePage(episode) {
  const result = episode.outcome !== "ok" ? textNodes(episode.outcome) : [episode.success ? "solved" : "not solved"];
  const facts = el("div.facts", el("span", markOf(episode), " ", el("b", ...result)), fact("after steps", `${episode.step}`), fact("weights", `${episode.version}`), fact("k", short(episode.k)),
    fact("student plays", windowText(episode.window)), fact("ended by", ...textNodes(episode.end)), fact("reward", short(episode.reward)), fact("trajectory KL", `${short(episode.kl)}`));
  const family = Array.isArray(episode.family) || episode.family ? el("span.muted", " ", ...textNodes(episode.family)) : null;
  const parts = [el("h3", ...textNodes(episode.task), family), facts];
  if (Array.isArray(episode.detail) || episode.detail) parts.push(el("ul.notes", el("li.warning", ...textNodes(episode.detail))));
  parts.push(...(episode.turns.length ? episode.turns.map(turnOf) : [empty("No turn of this episode was recorded.")]));
  if (episode.hidden_turns) parts.push(el("p.empty", `${episode.hidden_turns} more turns are left out.`));
  if (episode.turns.some((turn) => turn.tokens)) parts.push(tokenScale());
  return parts;
}

function turnOf(turn) {
  const isTeacher = turn.actor === "teacher";
  const who = el("div.who", el("b", `Turn ${turn.index}`), isTeacher ? "teacher, replayed" : "student");
  if (turn.kl !== undefined) who.append(el("br"), `KL ${short(turn.kl)}`);
  const answer = el("div.answer", ...(turn.tokens ? tokensOf(turn) : textNodes(turn.text)));
  const sent = el("div.sent");
  if (plain(turn.action).trim() !== plain(turn.text).trim()) sent.append("sent to the environment: ", el("code", ...textNodes(turn.action)));
  if (plain(turn.action) === "") sent.append(el("span.mark-odd", " no command was found in this answer"));
  if (turn.finish === "length") sent.append(el("span.mark-odd", " cut off at the token limit"));
  if (turn.reward) sent.append(` reward ${short(turn.reward)}`);
  if (turn.done) sent.append(" episode done");
  const body = el("div", el("div.observation", ...textNodes(turn.observation)), answer, sent.childNodes.length ? sent : null);
  return el(isTeacher ? "div.turn.teacher" : "div.turn", who, body);
}

function tokensOf(turn) {
  const nodes = turn.tokens.map((text, i) => {
    const node = painted(el("span.t", ...textNodes(text)), "backgroundColor", tokenColour(turn.token_kl[i]));
    const show = (event) => showTip(event.clientX, event.clientY, el("b", JSON.stringify(plain(text))), tipRow(null, "reverse KL", short(turn.token_kl[i], 4)),
      ...(turn.student.length ? [tipRow(null, "student", likelihood(turn.student[i]))] : []), ...(turn.teacher.length ? [tipRow(null, "teacher", likelihood(turn.teacher[i]))] : []));
    node.addEventListener("pointerenter", show);
    node.addEventListener("pointermove", show);
    node.addEventListener("pointerleave", hideTip);
    return node;
  });
  if (turn.hidden_tokens) nodes.push(el("span.clipped", `${turn.hidden_tokens} tokens left out`));
  return nodes;
}

const likelihood = (logprob) => (logprob === null ? "–" : `log p ${logprob.toFixed(3)}, ${percent(Math.exp(logprob), 2)}`);

function tokenScale() {
  const steps = [0, 0.1, 0.25, 0.5, 0.75, 1].map((share) => {
    const node = painted(el("span.t", ` ${short(share * klTop, 2)} `), "backgroundColor", tokenColour(share * klTop));
    return painted(node, "padding", "0.1em 0.5em");
  });
  return el("p.hint", "Reverse KL of a token, nats: ", ...steps, " and more");
}

function setUpReader() {
  const select = find("reader-run");
  select.replaceChildren(...RUNS.map((run, index) => Object.assign(el("option", `${run.name} (${run.episodes.length})`), { value: `${index}` })));
  select.addEventListener("change", () => openEpisode(Number(select.value), 0));
  const first = RUNS.findIndex((run) => run.episodes.length);
  openEpisode(Math.max(first, 0), 0);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "n") turnPage(1);
    if (event.key === "p") turnPage(-1);
  });
}
