"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#3b7cc4", "#d9722e", "#2a9d76", "#b3559a", "#8d7b1c", "#2292b0", "#cf4455", "#8672d1"];
const COST_COLORS = ["#3b7cc4", "#2292b0", "#2a9d76", "#7f93a8", "#d9722e", "#98a2ad", "#8672d1", "#b3559a", "#b59b1f", "#59636e"];
const LOW = "#2b6cb8", HIGH = "#d23f31";
const STEP_COLORS = {
  forward: "#3b7cc4", backward: "#d9722e", pipeline: "#98a2ad", gradients: "#8672d1", optimizer: "#2a9d76", data: "#b59b1f",
};
const STEP_NAMES = { pipeline: "send and receive", gradients: "gradient reduction" };
const state = { x: "steps", step: 0 };
const drawings = []; // functions, each draws one chart as the state wants it

const color = (number) => COLORS[number % COLORS.length];
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = (value, digits = 4) => value.toLocaleString("en", { maximumSignificantDigits: digits });

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function legend(entries) {
  return element("ul", { className: "legend" }, ...entries.map(([name, background]) => {
    const chip = element("span", { className: "chip" });
    chip.style.background = background;
    return element("li", {}, chip, name);
  }));
}

// A card with a title and a legend in a section; returns where the chart goes and the line below it.
function card(section, title, unit, { size = "", entries = [] } = {}) {
  const plot = element("div", { className: "plot" });
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${title}, ${unit}`);
  const note = element("p");
  const caption = element("figcaption", {}, element("h3", { textContent: title }), element("span", { textContent: unit }));
  const names = entries.length > 1 ? [legend(entries)] : [];
  document.querySelector(`#${section} .charts`)
    .append(element("figure", { className: size }, caption, ...names, plot, note));
  return { plot, note };
}

function layout(own) {
  const line = variable("--line");
  const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, separatethousands: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: variable("--text"), size: 12, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: variable("--card"), bordercolor: line, font: { color: variable("--text") } },
    margin: { l: 44, r: 10, t: 10, b: 36 },
    showlegend: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...own,
    xaxis: { ...axis, ...own.xaxis },
    yaxis: { ...axis, ...own.yaxis },
  };
}

function draw(plot, traces, own) {
  Plotly.react(plot, traces, layout(own), { responsive: true, displayModeBar: false });
}

// ---- curves

function curveTraces(line, lineColor) {
  const x = line[state.x];
  const trace = {
    type: "scatter", x, y: line.mean, name: line.label, mode: x.length > 40 ? "lines" : "lines+markers",
    line: { color: lineColor, width: 1.6 }, marker: { size: 5, color: lineColor },
    hovertemplate: `%{y:.5~g}<extra>${line.label}</extra>`,
  };
  if (!line.low) return [trace];
  const edge = { type: "scatter", x, mode: "lines", line: { color: lineColor, width: 0.7 }, opacity: 0.55,
    hoverinfo: "skip" };
  trace.customdata = line.low.map((low, i) => [low, line.high[i]]);
  trace.hovertemplate = `%{y:.5~g} (%{customdata[0]:.5~g} to %{customdata[1]:.5~g})<extra>${line.label}</extra>`;
  return [{ ...edge, y: line.low }, { ...edge, y: line.high, fill: "tonexty", fillcolor: `${lineColor}40` }, trace];
}

function drawCurves(chart) {
  const ofOneRun = data.runs.length === 1;
  const colors = chart.lines.map((line, i) => color(ofOneRun ? i : line.run));
  const entries = ofOneRun ? chart.lines.map((line, i) => [line.label, colors[i]]) : [];
  const { plot, note } = card(chart.section, chart.title, chart.unit, { entries });
  const missing = chart.lines.filter((line) => line.not_finite);
  note.textContent = missing.map((line) => `${line.label}: not finite at ${line.not_finite}`).join("; ");
  drawings.push(() => draw(
    plot,
    chart.lines.flatMap((line, i) => curveTraces(line, colors[i])),
    {
      height: 250, hovermode: "x unified",
      xaxis: { title: { text: state.x, standoff: 6 }, exponentformat: "SI", minexponent: 4 },
      yaxis: { exponentformat: "e", minexponent: 5 },
    },
  ));
}

// ---- heat maps

function aboutTheMean(strong) {
  return [[0, LOW], [1 / strong, variable("--neutral")], [1, HIGH]];
}

const ofRun = (run) => (data.runs.length > 1 ? `: ${data.runs[run]}` : "");
const heatHeight = (layers) => Math.max(170, Math.min(560, 16 * layers + 90));
const layerAxis = (layers) => ({ title: { text: "layer" }, autorange: "reversed", dtick: layers.length > 24 ? 5 : 1 });

function drawViolations(chart) {
  const { plot } = card("routing", `Violation by layer${ofRun(chart.run)}`, "largest expert load over the mean, minus 1");
  const zmax = Math.max(...data.violations.flatMap((each) => each.values.map((row) => Math.max(...row)))) || 1;
  drawings.push(() => draw(
    plot,
    [{ type: "heatmap", x: chart.steps, y: chart.layers, z: chart.values, zmin: 0, zmax,
      colorscale: [[0, variable("--neutral")], [1, HIGH]], colorbar: { thickness: 10, outlinewidth: 0 },
      hovertemplate: "step %{x}, layer %{y}: %{z:.2f}<extra></extra>" }],
    { height: Math.max(250, heatHeight(chart.layers.length)), xaxis: { title: { text: "steps" } }, yaxis: layerAxis(chart.layers) },
  ));
}

// Loads of one step, a row for each layer; null where there is no number.
function unpack(load) {
  const bytes = Uint8Array.from(atob(load.data), (character) => character.charCodeAt(0));
  const packed = new Uint16Array(bytes.buffer);
  const value = (n) => (n === 65535 ? null : (n * load.max) / 65534);
  return (frame) => load.layers.map((_, row) => {
    const start = (frame * load.layers.length + row) * load.columns;
    return Array.from(packed.subarray(start, start + load.columns), value);
  });
}

function busiest(rows, load, what) {
  let [most, place, idle] = [-1, "", 0];
  rows.forEach((row, i) => row.forEach((value, column) => {
    if (value > most) [most, place] = [value, `${what} ${column} of layer ${load.layers[i]}`];
    if (value === 0) idle += 1;
  }));
  return `busiest: ${place}, ${most.toFixed(2)} times the mean` + (idle ? `; without tokens: ${idle}` : "");
}

function drawLoad(run, steps, kind, load) {
  const what = kind.split("_")[0];
  const title = `${what === "expert" ? "Expert" : "Device"} load${ofRun(run)}`;
  const { plot, note } = card("routing", title, "over the mean, by layer", { size: data.runs.length === 1 && what === "expert" ? "double" : "" });
  const at = unpack(load);
  const strong = Math.max(...data.loads.map((loads) => loads.kinds[kind]?.strong ?? 0)); // the same of all runs
  drawings.push(() => {
    const frame = Math.max(0, steps.findLastIndex((step) => step <= state.step));
    const rows = at(frame);
    note.textContent = `Step ${number(steps[frame], 9)}; ${busiest(rows, load, what)}.`;
    draw(
      plot,
      [{ type: "heatmap", y: load.layers, z: rows, zmin: 0, zmax: strong, colorscale: aboutTheMean(strong),
        colorbar: { thickness: 10, outlinewidth: 0 }, xgap: load.columns < 100 ? 1 : 0, ygap: 1,
        hovertemplate: `layer %{y}, ${what} %{x}: %{z:.2f} times the mean<extra></extra>` }],
      { height: heatHeight(load.layers.length), yaxis: layerAxis(load.layers),
        xaxis: { title: { text: what === "expert" ? "routed expert" : "device" }, dtick: load.columns > 16 ? null : 1 } },
    );
  });
  return drawings.at(-1);
}

function drawLoads() {
  const steps = [...new Set(data.loads.flatMap((loads) => loads.steps))].sort((a, b) => a - b);
  const input = element("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, id: "load-step" });
  const output = element("output", { htmlFor: "load-step" });
  input.setAttribute("aria-label", "Step of the load heat maps");
  document.querySelector("#routing .charts").append(
    element("div", { className: "slider" }, element("label", { htmlFor: "load-step", textContent: "Loads at step" }), output, input));
  const redraw = data.loads.flatMap((loads) =>
    Object.entries(loads.kinds).map(([kind, load]) => drawLoad(loads.run, loads.steps, kind, load)));
  const choose = () => {
    state.step = steps[input.value];
    output.textContent = number(state.step, 9);
    input.setAttribute("aria-valuetext", `step ${state.step}`);
  };
  choose();
  input.addEventListener("input", () => { choose(); requestAnimationFrame(() => redraw.forEach((drawing) => drawing())); });
}

// ---- one step

function drawTimeline(chart) {
  const entries = Object.entries(STEP_COLORS).filter(([kind]) => chart.bars.some((bar) => bar[1] === kind))
    .map(([kind, background]) => [STEP_NAMES[kind] ?? kind, background]);
  const title = `Time line of step ${number(chart.step, 9)}${ofRun(chart.run)}`;
  const { plot, note } = card("step", title, "milliseconds, by rank", { size: "wide", entries });
  const busy = chart.busy.map((share) => Math.round(100 * share));
  note.textContent = `Forward and backward passes take ${Math.min(...busy)} to ${Math.max(...busy)} % of the time. ` +
    "Numbers are those of micro batches" + (chart.bars.some((bar) => bar[1] === "forward" && bar[2].includes("."))
      ? ", and of model chunks after the point." : ".");
  const traces = Object.keys(STEP_COLORS).map((kind) => {
    const bars = chart.bars.filter((bar) => bar[1] === kind);
    const isPass = kind === "forward" || kind === "backward";
    return {
      type: "bar", orientation: "h", name: STEP_NAMES[kind] ?? kind, marker: { color: STEP_COLORS[kind] },
      y: bars.map((bar) => chart.rows[bar[0]]), base: bars.map((bar) => bar[3]), x: bars.map((bar) => bar[4]),
      text: bars.map((bar) => (isPass ? bar[2] : "")), customdata: bars.map((bar) => bar[2]),
      textposition: "inside", insidetextanchor: "middle", textangle: 0, width: kind === "data" ? 0.4 : 0.8,
      hovertemplate: `${STEP_NAMES[kind] ?? kind} %{customdata}<br>%{x:.2f} ms from %{base:.2f} ms<extra>%{y}</extra>`,
    };
  });
  drawings.push(() => draw(plot, traces.filter((trace) => trace.x.length), {
    height: 30 * chart.rows.length + 60, barmode: "overlay", uniformtext: { minsize: 8, mode: "hide" },
    hovermode: "closest", yaxis: { autorange: "reversed", type: "category" },
  }));
}

function drawCosts(costs) {
  const unit = `milliseconds${costs.on_gpu ? " of the GPU" : " of the main thread"}`;
  const kinds = Object.entries(costs.kinds).map(([kind, ms], i) => ({ kind, ms, background: COST_COLORS[i] }))
    .filter(({ ms }) => ms.some(Boolean));
  const entries = kinds.map(({ kind, background }) => [kind, background]);
  const { plot, note } = card("step", "Where the time of profiled steps went", unit, { size: "wide", entries });
  note.textContent = "Of what happens at the same time the first in this order counts: communication that is hidden behind computing does not.";
  const total = costs.rows.map((_, row) => Object.values(costs.kinds).reduce((sum, kind) => sum + kind[row], 0));
  const traces = kinds.map(({ kind, ms, background }) => ({
    type: "bar", orientation: "h", name: kind, y: costs.rows, x: ms, marker: { color: background },
    text: ms.map((value, row) => `${Math.round((100 * value) / total[row])} %`), textposition: "inside", textangle: 0,
    hovertemplate: `${kind}: %{x:.1f} ms, %{text}<extra>%{y}</extra>`,
  }));
  drawings.push(() => draw(plot, traces, {
    height: 34 * costs.rows.length + 60, barmode: "stack", uniformtext: { minsize: 8, mode: "hide" },
    hovermode: "closest", yaxis: { autorange: "reversed", type: "category" },
  }));
}

// ---- the page

// One chart after the other, so that the first can be looked at while the others are drawn.
async function redrawAll() {
  delete document.documentElement.dataset.drawn;
  for (const drawing of drawings) {
    drawing();
    await new Promise((resume) => setTimeout(resume));
  }
  document.documentElement.dataset.drawn = Math.round(performance.now());
}

if (data.runs.length > 1) document.querySelector(".controls").prepend(legend(data.runs.map((run, i) => [run, color(i)])));
document.getElementById("x-axis").addEventListener("change", (event) => { state.x = event.target.value; redrawAll(); });
document.getElementById("theme").addEventListener("click", () => {
  const isDark = variable("color-scheme") === "dark";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  redrawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

data.curves.forEach(drawCurves);
data.violations.forEach(drawViolations);
if (data.loads.length) drawLoads();
data.timelines.forEach(drawTimeline);
if (data.costs) drawCosts(data.costs);
redrawAll();
