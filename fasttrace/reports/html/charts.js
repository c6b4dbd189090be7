"use strict";
// Heat maps and lines. Every text that plotly gets is escaped, because it reads some HTML in labels.

// ColorBrewer's sequential scales, from nothing to the largest value, and one of two colors that meet at 0.
const SCALES = {
  Purples: ["#fcfbfd", "#efedf5", "#dadaeb", "#bcbddc", "#9e9ac8", "#807dba", "#6a51a3", "#54278f", "#3f007d"],
  Greens: ["#f7fcf5", "#e5f5e0", "#c7e9c0", "#a1d99b", "#74c476", "#41ab5d", "#238b45", "#006d2c", "#00441b"],
  Reds: ["#fff5f0", "#fee0d2", "#fcbba1", "#fc9272", "#fb6a4a", "#ef3b2c", "#cb181d", "#a50f15", "#67000d"],
  RdBu: [
    ...["#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7"],
    ...["#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"],
  ],
  Blues: ["#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"],
};
const DASHES = { before_subject: "dot", first_subsequent: "dash", further: "dash", last: "dash" };
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false, doubleClick: false };
const TOKEN_LENGTH = 16;

function digits(value, count = 4) {
  return value === null || Number.isNaN(value) ? "–" : Number(value).toPrecision(count);
}

// A bound of an interval with as many decimals as its mean is written with: 0.123 [0.101 … 0.145].
function alike(value, mean, count = 3) {
  const shown = digits(mean, count);
  if (value === null || mean === null || shown.includes("e")) return digits(value, count);
  return Number(value).toFixed((shown.split(".")[1] ?? "").length);
}

function signed(value, count = 4) {
  return (value > 0 ? "+" : "") + digits(value, count);
}

// A token as one sees it: no leading space, other spaces and control characters made visible.
function visible(token) {
  const word = token.startsWith(" ") && token.trim() ? token.slice(1) : token;
  return word
    .replaceAll(" ", "␣")
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (mark) => "\\u" + mark.codePointAt(0).toString(16).padStart(4, "0"));
}

function shortened(text, length = TOKEN_LENGTH) {
  const letters = [...text];
  if (letters.length <= length) return text;
  return letters.slice(0, length / 2).join("") + "…" + letters.slice(1 - length / 2).join("");
}

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function broken(text) {
  return escaped(text).replaceAll("\n", "<br>");
}

function colorScale(name) {
  return SCALES[name].map((color, i, all) => [i / (all.length - 1), color]);
}

function themeColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function draw(box, traces, layout, height) {
  const base = {
    height,
    margin: { l: 8, r: 8, t: 8, b: 40 },
    font: { family: "system-ui, sans-serif", size: 12, color: themeColor("--text") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: false,
    showlegend: false,
    hoverlabel: { align: "left", namelength: -1 },
  };
  box.style.height = height + "px";
  return Plotly.newPlot(box, traces, { ...base, ...layout }, CONFIG);
}

function axis(options) {
  const colors = { linecolor: themeColor("--muted"), gridcolor: themeColor("--grid") };
  const frame = { showgrid: false, zeroline: false, mirror: true, showline: true };
  return { automargin: true, fixedrange: true, ...frame, ...colors, ...options };
}

function blockAxis(options = {}) {
  return axis({ title: { text: "block", standoff: 4 }, tickformat: "d", nticks: 10, ...options });
}

// From the lightest color, which is what no effect gives, to the darkest.
function risingScale(values, lowest, color) {
  const highest = values.flat().reduce((most, value) => (value > most ? value : most), lowest);
  const zmax = highest > lowest ? highest : lowest + Math.max(Math.abs(lowest) * 1e-3, 1e-12);
  return { zmin: lowest, zmax, colorscale: colorScale(color) };
}

// Of effects of both signs: white is 0, and both colors are as long.
function signedScale(values) {
  const most = values.flat().reduce((most, value) => (Math.abs(value) > most ? Math.abs(value) : most), 0) || 1e-12;
  return { zmin: -most, zmax: most, colorscale: colorScale("RdBu") };
}

// rows: labels of the rows, top first; values and texts: [row][block]; scale: of colors.
function heatMap(box, { rows, values, texts, scale, legend, template }) {
  const trace = {
    type: "heatmap",
    z: values,
    customdata: texts,
    hovertemplate: template + "<extra></extra>",
    hoverongaps: false,
    ...scale,
    colorbar: { thickness: 9, len: 1, outlinewidth: 0, nticks: 5, title: { text: broken(legend), font: { size: 12 } } },
  };
  const ticks = rows.map((_, i) => i);
  const yaxis = axis({ autorange: "reversed", tickmode: "array", tickvals: ticks, ticktext: rows.map(escaped) });
  return draw(box, [trace], { xaxis: blockAxis(), yaxis }, 70 + Math.max(110, 19 * rows.length));
}

// The heat map of one stream of a fact, in a metric of which the runs without edits have some values.
// effects: Float32Array [layers * tokens].
function factMap(box, fact, stream, effects, metric, runs) {
  const count = fact.tokens.length;
  const labels = fact.tokens.map((token, i) => {
    return shortened(visible(token)) + (fact.span[0] <= i && i < fact.span[1] ? "*" : "");
  });
  const cell = (i, layer) => effects[layer * count + i];
  const layers = [...Array(fact.layers).keys()];
  const shifts = fact.tokens.map((_, i) => layers.map((layer) => cell(i, layer)));
  const values = shifts.map((row) => row.map((effect) => runs.background + effect));
  const texts = fact.tokens.map((token, i) =>
    layers.map((layer) => [escaped(visible(token)), digits(values[i][layer]), signed(cell(i, layer))]),
  );
  const isProb = metric.name === "prob";
  const name = isProb ? "probability" : escaped(metric.title).replaceAll("%{", "%&#123;");
  const template = `%{customdata[0]}, block %{x}<br>${name} %{customdata[1]}<br>indirect effect %{customdata[2]}`;
  const legend = isProb ? `p(${shortened(visible(fact.target), 9)})` : `effect on\n${metric.title}`;
  const scale = isProb ? risingScale(values, runs.corrupted, stream.color) : signedScale(shifts);
  return heatMap(box, { rows: labels, values: isProb ? values : shifts, texts, scale, legend, template });
}

function meanTexts(line) {
  return line.mean.map((mean, i) => [
    line.name,
    digits(mean),
    `${alike(line.low[i], mean, 4)} … ${alike(line.high[i], mean, 4)}`,
    `${alike(line.boot_low[i], mean, 4)} … ${alike(line.boot_high[i], mean, 4)}`,
    `${line.count[i].toLocaleString("en")} tokens of ${line.facts[i].toLocaleString("en")} facts`,
  ]);
}

const MEAN_TEMPLATE =
  "%{customdata[0]}, block %{x}<br>mean %{customdata[1]}<br>95 % interval %{customdata[2]}" +
  "<br>bootstrap %{customdata[3]}<br>%{customdata[4]}";

function averageMap(box, averages, stream, isProb) {
  const values = stream.lines.map((line) => line.mean);
  return heatMap(box, {
    rows: stream.lines.map((line) => line.name),
    values,
    texts: stream.lines.map(meanTexts),
    scale: isProb ? risingScale(values, averages.lowest, stream.color) : signedScale(values),
    legend: averages.value,
    template: MEAN_TEMPLATE,
  });
}

function band(line, blocks) {
  const inside = blocks.filter((block) => line.low[block] !== null);
  return {
    x: [...inside, ...inside.toReversed()],
    y: [...inside.map((block) => line.low[block]), ...inside.toReversed().map((block) => line.high[block])],
    fill: "toself",
    fillcolor: line.color + "33",
    line: { width: 0 },
    mode: "lines",
    hoverinfo: "skip",
  };
}

function averageLines(box, averages, stream, range) {
  const blocks = [...stream.lines[0].mean.keys()];
  const mode = blocks.length === 1 ? "markers" : "lines";
  const lines = stream.lines.map((line) => ({
    x: blocks,
    y: line.mean,
    mode,
    line: { color: line.color, width: 2, dash: DASHES[line.role] },
    marker: { color: line.color },
    customdata: meanTexts(line),
    hovertemplate: MEAN_TEMPLATE + "<extra></extra>",
  }));
  const traces = [...stream.lines.map((line) => band(line, blocks)), ...lines];
  const nothing = { type: "line", xref: "paper", x0: 0, x1: 1, y0: averages.lowest, y1: averages.lowest };
  const shapes = [{ ...nothing, line: { width: 1, dash: "dot", color: "#8a8a96" } }];
  const yaxis = axis({ range, title: { text: broken(averages.value), standoff: 6 }, showgrid: true });
  return draw(box, traces, { xaxis: blockAxis(), yaxis, shapes, hovermode: "closest" }, 270);
}

// One range for all panels, so that streams can be compared.
function lineRange(averages) {
  const lines = averages.streams.flatMap((stream) => stream.lines);
  const ends = lines.flatMap((line) => [...line.mean, ...line.low, ...line.high]).filter((value) => value !== null);
  const low = Math.min(averages.lowest, ...ends);
  const high = Math.max(averages.lowest, ...ends);
  const margin = (high - low) * 0.05 || Math.max(Math.abs(low) * 1e-3, 1e-12);
  return [low - margin, high + margin];
}

// The colors of the page changed, from light to dark or back.
function redrawTheme() {
  const changes = { "font.color": themeColor("--text") };
  for (const name of ["xaxis", "yaxis"]) {
    changes[`${name}.linecolor`] = themeColor("--muted");
    changes[`${name}.gridcolor`] = themeColor("--grid");
  }
  for (const chart of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(chart, changes);
}
