"use strict";
// The page around the charts. Text enters it as text nodes only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");

// The metric that is shown.

let metric = DATA.metrics.find(({ name }) => name === DATA.metric);
const isProb = () => metric.name === "prob";
const averagesShown = () => (isProb() ? DATA.averages : (DATA.others[metric.name] ?? null));

// Values of a fact's runs without edits; none of a fact that does not have the metric.
const runsOf = (fact) => (isProb() ? fact : (fact.runs?.[metric.name] ?? {}));

function showChooser(rows) {
  const options = DATA.metrics.map(({ name, title }) => element("option", { value: name }, title));
  at("metric").append(...options);
  at("metric").value = metric.name;
  at("chooser").hidden = options.length < 2;
  at("metric").addEventListener("change", () => {
    metric = DATA.metrics.find(({ name }) => name === at("metric").value);
    showTiles();
    showAverages();
    rows.forEach(updateFact);
  });
}

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Summary.

function tile(name, value, detail) {
  const rest = detail ? [element("small", {}, detail)] : [];
  return element("div", {}, element("dt", {}, name), element("dd", {}, value, ...rest));
}

function interval(row) {
  return row.low === null ? "" : `95 %: ${alike(row.low, row.mean)} … ${alike(row.high, row.mean)}`;
}

function tiles() {
  const { facts, traced, asked, known, missing = 0 } = DATA.counts;
  const shown = [tile("Facts traced", count(traced), `of ${count(facts + missing)}`)];
  if (asked) shown.push(tile("Known by the model", count(known), `of ${count(asked)} with an expected answer`));
  if (!averagesShown()) return shown;
  const [clean, corrupted, total] = averagesShown().totals;
  const name = isProb() ? "p(answer)" : metric.title;
  shown.push(
    tile(`${name}, clean`, digits(clean.mean, 3), interval(clean)),
    tile(`${name}, corrupted`, digits(corrupted.mean, 3), interval(corrupted)),
    tile("Average total effect", signed(total.mean, 3), interval(total)),
  );
  return shown;
}

function showTiles() {
  at("tiles").replaceChildren(...tiles());
}

const LEADS = {
  denoising: "Denoising: what restoring one clean state brings back in the corrupted run.",
  noising: "Noising: what one corrupted state takes away in the clean run.",
};

function folded(title, lines) {
  const items = lines.map((line) => element("li", {}, line));
  return element("details", {}, element("summary", {}, title), element("ul", {}, ...items));
}

function showSummary() {
  document.title = DATA.title;
  at("title").textContent = DATA.title;
  at("lead").textContent = LEADS[DATA.direction] ?? `Directions: ${DATA.direction}.`;
  at("notes").append(...DATA.notes.map((note) => element("p", { class: "note" }, note)));
  showTiles();
  const { reasons, facts, traced } = DATA.counts;
  const lines = reasons.map(([reason, number]) => `${count(number)} × ${reason}`);
  if (lines.length) at("skipped").append(folded(`Skipped facts: ${count(facts - traced)}`, lines));
  const bad = DATA.bad_rows;
  if (bad.length) at("skipped").append(folded(`Rows of the data set that are no facts: ${count(bad.length)}`, bad));
  const about = DATA.about.map(([name, value]) => {
    return element("div", {}, element("dt", {}, name), element("dd", {}, value));
  });
  at("about").append(...about);
}

// Averages.

function figure(title, note = "") {
  const box = element("div", { class: "chart", role: "img", "aria-label": note ? `${title}. ${note}` : title });
  const words = [element("h3", {}, title), ...(note ? [element("p", { class: "quiet" }, note)] : [])];
  return { box, node: element("figure", {}, ...words, box) };
}

function legendItem(line) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const stroke = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const dash = { dot: "2 3", dash: "6 3" }[DASHES[line.role]] ?? "none";
  const values = { d: "M0 5H26", stroke: line.color, "stroke-width": 3, "stroke-dasharray": dash };
  for (const [name, value] of Object.entries(values)) stroke.setAttribute(name, value);
  for (const [name, value] of Object.entries({ width: 26, height: 10, "aria-hidden": true })) svg.setAttribute(name, value);
  svg.append(stroke);
  return element("li", {}, svg, line.name);
}

function showAverages() {
  const averages = averagesShown();
  for (const chart of at("averages").querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  for (const id of ["average-maps", "legend", "average-lines"]) at(id).replaceChildren();
  at("averages").hidden = !averages;
  if (!averages) return;
  at("averages-note").textContent =
    `Means over the tokens of ${count(averages.facts)} ${averages.facts === 1 ? "fact" : "facts"}; bands and intervals ` +
    "are 95 %, with errors clustered by fact. The lightest color and the dotted line are what restoring nothing gives.";
  at("legend").append(...averages.streams[0].lines.map(legendItem));
  const maps = averages.streams.map((stream, i) => figure(stream.title, peakNote(averages.peaks[i], averages.falls)));
  const lines = averages.streams.map((stream) => figure(stream.title));
  at("average-maps").append(...maps.map(({ node }) => node));
  at("average-lines").append(...lines.map(({ node }) => node));
  const range = lineRange(averages);
  averages.streams.forEach((stream, i) => {
    averageMap(maps[i].box, averages, stream, isProb());
    averageLines(lines[i].box, averages, stream, range);
  });
}

function peakNote(peak, falls) {
  const bounds = peak.low === null ? "" : ` [${alike(peak.low, peak.mean)} … ${alike(peak.high, peak.mean)}]`;
  return `${falls ? "Smallest" : "Largest"}: ${peak.name.toLowerCase()}, block ${peak.layer}, ${digits(peak.mean, 3)}${bounds}`;
}

// A fact's heat maps.

// Indirect effects of fact i, a Float32Array [layers * tokens] per stream; null without the metric.
function decoded(i, fact) {
  const number = DATA.metrics.indexOf(metric);
  const kept = at(number ? `grid-${i}-${number}` : `grid-${i}`);
  if (!kept) return null;
  const bytes = Uint8Array.from(atob(kept.textContent), (letter) => letter.charCodeAt(0));
  const all = new Float32Array(bytes.buffer);
  const size = fact.layers * fact.tokens.length;
  return fact.streams.map((_, k) => all.subarray(k * size, (k + 1) * size));
}

// The cell that comes closest to the source run, or goes furthest beyond it.
function strongest(fact, effects) {
  const { background, total } = runsOf(fact);
  const sign = total < 0 && !(isProb() && DATA.direction === "denoising") ? -1 : 1;
  const best = effects.reduce((found, value, i) => (sign * value > sign * effects[found] ? i : found), 0);
  const token = visible(fact.tokens[best % fact.tokens.length]);
  const layer = Math.floor(best / fact.tokens.length);
  return `Strongest: ${token}, block ${layer}, ${digits(background + effects[best])} (${signed(effects[best])})`;
}

// The prompt and its counterfactuals below each other, with the tokens that differ marked.
function pairNode(fact) {
  const differs = new Set(fact.pair.differing);
  const line = (name, tokens) => {
    const words = tokens.map((token, i) => (differs.has(i) ? element("mark", {}, visible(token)) : visible(token)));
    return [element("span", { class: "quiet" }, name), " ", ...words.flatMap((word) => [word, " "]), "\n"];
  };
  const others = fact.pair.tokens.flatMap((tokens) => line("counterfactual", tokens));
  return element("p", { class: "pair" }, ...line("clean", fact.tokens), ...others);
}

function detailRow(i, fact) {
  const grids = decoded(i, fact);
  const figures = grids ? fact.streams.map((stream, k) => figure(stream.title, strongest(fact, grids[k]))) : [];
  const charts = element("div", { class: "charts" }, ...figures.map(({ node }) => node));
  const row = element("tr", { class: "detail", id: `detail-${i}`, role: "row" });
  const above = fact.pair ? [pairNode(fact)] : [];
  if (!grids) above.push(element("p", { class: "quiet" }, `This fact has no ${metric.title}.`));
  row.append(element("td", { colspan: String(COLUMNS.length), role: "cell" }, ...above, charts));
  const runs = runsOf(fact);
  const paint = () => figures.forEach(({ box }, k) => factMap(box, fact, fact.streams[k], grids[k], metric, runs));
  return { row, paint };
}

function openDetail(i, fact, body) {
  const { row, paint } = detailRow(i, fact);
  body.append(row);
  paint();
}

function closeDetail(body) {
  for (const chart of body.querySelectorAll(".chart")) Plotly.purge(chart);
  body.lastChild.remove();
}

function toggle(i, fact, body, button) {
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!open));
  body.classList.toggle("open", !open);
  if (open) closeDetail(body);
  else openDetail(i, fact, body);
}

// The table of facts.

const yesNo = (value) => (value === null ? "–" : value ? "yes" : "no");
const COLUMNS = [
  { name: "Id", key: (fact) => fact.id },
  { name: "Prompt", key: (fact) => fact.prompt, kind: "prompt" },
  { name: "Answer", key: (fact) => fact.target ?? "", text: (fact) => (fact.target ?? "–").trim() || "␣", kind: "answer" },
  { name: "Relation", key: (fact) => fact.relation ?? "", text: (fact) => fact.relation ?? "–" },
  { name: "Clean", key: (fact) => runsOf(fact).clean, kind: "number" },
  { name: "Corrupted", key: (fact) => runsOf(fact).corrupted, kind: "number" },
  { name: "Total effect", key: (fact) => runsOf(fact).total, text: (fact) => signedOrDash(runsOf(fact).total), kind: "number" },
  { name: "Known", key: (fact) => fact.correct, text: (fact) => yesNo(fact.correct) },
  { name: "Status", key: status, kind: "status" },
];

function signedOrDash(value) {
  return value == null ? "–" : signed(value);
}

function status(fact) {
  return fact.tokens ? "traced" : `skipped: ${fact.reason ?? "no reason given"}`;
}

// Where the traced subject stands in the prompt, which may hold it twice.
function subjectStart(fact) {
  if (!fact.tokens) return fact.prompt.indexOf(fact.subject);
  const extra = Math.max(0, fact.tokens.join("").length - fact.prompt.length); // a token at the front that is no text
  const before = fact.tokens.slice(0, fact.span[0]).join("").length - extra;
  const near = fact.prompt.indexOf(fact.subject, Math.max(0, before));
  return near < 0 ? fact.prompt.indexOf(fact.subject) : near;
}

function markedPrompt(fact) {
  const start = subjectStart(fact);
  if (start < 0 || !fact.subject) return [fact.prompt];
  const stop = start + fact.subject.length;
  return [fact.prompt.slice(0, start), element("mark", {}, fact.prompt.slice(start, stop)), fact.prompt.slice(stop)];
}

function promptContent(fact, i, body) {
  if (!fact.tokens) return markedPrompt(fact);
  const names = { type: "button", "aria-expanded": "false", "aria-controls": `detail-${i}` };
  const button = element("button", names, ...markedPrompt(fact));
  button.addEventListener("click", () => toggle(i, fact, body, button));
  return [button];
}

function content(column, fact, i, body) {
  if (column.kind === "prompt") return promptContent(fact, i, body);
  if (column.text) return [column.text(fact)];
  const value = column.key(fact);
  return [column.kind === "number" ? digits(value ?? null) : String(value)];
}

// Each fact is a tbody of its own, so that its heat maps stay with it when the table is sorted.
function factBody(fact, i) {
  const body = element("tbody", { role: "rowgroup" });
  const cells = COLUMNS.map((column) => {
    const names = { class: column.kind ?? "", role: "cell" };
    if (column.kind !== "prompt") names["data-label"] = column.name;
    return element("td", names, ...content(column, fact, i, body));
  });
  body.append(element("tr", { role: "row", class: fact.tokens ? "" : "skipped" }, ...cells));
  return body;
}

// Another metric was chosen.
function updateFact({ fact, body, i }) {
  const cells = body.firstChild.children;
  COLUMNS.forEach((column, k) => {
    if (column.kind === "number") cells[k].replaceChildren(...content(column, fact, i, body));
  });
  if (!body.classList.contains("open")) return;
  closeDetail(body);
  openDetail(i, fact, body);
}

function sortKey(column, fact) {
  const key = column.key(fact);
  return typeof key === "boolean" ? Number(key) : (key ?? null);
}

const collator = new Intl.Collator("en", { numeric: true });

function compared(one, other) {
  if (typeof one === "string") return collator.compare(one, other);
  return one - other;
}

// Facts without the value come last in both directions.
function sorted(rows, column, direction) {
  const keyed = rows.map((row) => [sortKey(column, row.fact), row]);
  const has = keyed.filter(([key]) => key !== null).sort(([one], [other]) => direction * compared(one, other));
  return [...has, ...keyed.filter(([key]) => key === null)].map(([, row]) => row);
}

function heading(column, rows) {
  const button = element("button", { type: "button" }, column.name);
  const head = element("th", { scope: "col", role: "columnheader", class: column.kind ?? "" }, button);
  button.addEventListener("click", () => {
    const first = column.kind === "number" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const mate of head.parentNode.children) mate.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    at("facts").append(...sorted(rows, column, order === "ascending" ? 1 : -1).map(({ body }) => body));
  });
  return head;
}

const SHOWS = {
  all: () => true,
  traced: (fact) => Boolean(fact.tokens),
  skipped: (fact) => !fact.tokens,
  known: (fact) => fact.correct === true,
  unknown: (fact) => fact.correct === false,
};

function filter(rows) {
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shows = SHOWS[at("show").value];
  let found = 0;
  for (const { fact, body, text } of rows) {
    body.hidden = !(shows(fact) && words.every((word) => text.includes(word)));
    found += !body.hidden;
  }
  at("found").textContent = `${count(found)} of ${count(rows.length)} facts`;
}

function showFacts() {
  const rows = DATA.facts.map((fact, i) => {
    const parts = [fact.id, fact.prompt, fact.subject, fact.target, fact.relation, fact.reason];
    return { fact, i, body: factBody(fact, i), text: parts.filter(Boolean).join("\n").toLowerCase() };
  });
  const heads = COLUMNS.map((column) => heading(column, rows));
  const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads));
  at("facts").append(head, ...rows.map(({ body }) => body));
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("search").addEventListener("input", () => filter(rows));
  at("show").addEventListener("change", () => filter(rows));
  filter(rows);
  showChooser(rows);
}

showSummary();
showAverages(); // before the table, because plotly measures text, and a long table makes that slow
showFacts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawTheme);
