// Reads values off the charts of a page, zooms into them, hides curves.
//
// A chart is an SVG with its data as JSON: {unit, right, low, top, log, series}, where
// series are [name, steps, values] and low and top are logarithms if log is true. Its
// curves lie in an inner SVG of 1000 x 1000 units, so a zoom is another viewBox.
"use strict";
const SIDE = 1000;

function written(value) {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e9)
    return size < 1e6 ? +(value / 1e3).toPrecision(4) + "k" : +(value / 1e6).toPrecision(4) + "M";
  return String(+value.toPrecision(4));
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle; else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

const tip = document.createElement("div");
tip.className = "tip";
document.body.append(tip);

for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(chart.dataset.chart);
  const plot = chart.querySelector(".plot");
  const labels = [...chart.querySelectorAll("text.x, text.y")];
  const told = labels.map(label => label.textContent);
  const box = ["x", "y", "width", "height"].map(key => +plot.getAttribute(key));
  const scaled = value => data.log ? Math.log10(value) : value;
  const hidden = name => chart.querySelector(`.off[data-name="${CSS.escape(name)}"]`);
  let view = [0, 0, SIDE, SIDE], from = null;

  // The place of the pointer in the plot, from 0 to 1, and the step that is there.
  function at(event) {
    const area = chart.getBoundingClientRect(), wide = chart.viewBox.baseVal.width;
    const x = (event.clientX - area.left) / area.width * wide;
    return Math.min(1, Math.max(0, (x - box[0]) / box[2]));
  }
  const stepAt = share => (view[0] + share * view[2]) / SIDE * data.right;

  function zoom(next) {
    view = next;
    plot.setAttribute("viewBox", view.join(" "));
    const whole = view[2] === SIDE && view[3] === SIDE;
    labels.forEach((label, i) => {
      const across = label.classList.contains("x");
      const share = across ? (+label.getAttribute("x") - box[0]) / box[2]
        : (+label.getAttribute("y") - 4 - box[1]) / box[3];
      let value = stepAt(share);
      if (!across) {
        value = data.top - (view[1] + share * view[3]) / SIDE * (data.top - data.low);
        if (data.log) value = 10 ** value;
      }
      label.textContent = whole ? told[i] : written(value);
    });
    chart.querySelectorAll(".level").forEach(x => x.style.display = whole ? "" : "none");
  }

  // Zooms to steps [a, b], and to the values that there are between them.
  function between(a, b) {
    const heights = [];
    for (const [name, steps, values] of data.series)
      steps.forEach((step, i) => {
        if (step >= a && step <= b && !hidden(name))
          heights.push((data.top - scaled(values[i])) / (data.top - data.low) * SIDE);
      });
    if (!heights.length) return;
    const high = Math.min(...heights), room = Math.max(1, Math.max(...heights) - high);
    const left = a / data.right * SIDE;
    zoom([left, high - 0.05 * room, (b - a) / data.right * SIDE, 1.1 * room]);
  }

  chart.addEventListener("pointermove", event => {
    const share = at(event), step = stepAt(share);
    const lines = [];
    let close = null;
    for (const [name, steps, values] of data.series) {
      if (hidden(name)) continue;
      const i = nearest(steps, step);
      if (close === null || Math.abs(steps[i] - step) < Math.abs(close - step)) close = steps[i];
      lines.push([name, values[i]]);
    }
    tip.replaceChildren(`${data.unit} ${written(close ?? step)}`, ...lines.map(([name, value]) => {
      const line = document.createElement("div");
      line.textContent = `${name}: ${written(value)}`;
      return line;
    }));
    tip.style.display = "block";
    const left = event.pageX + 14, most = document.documentElement.clientWidth - tip.offsetWidth;
    tip.style.left = Math.max(0, Math.min(left, most - 8)) + "px";
    tip.style.top = event.pageY + 14 + "px";
    if (from !== null) mark.setAttribute("width", Math.abs(share - from) * box[2]);
    if (from !== null) mark.setAttribute("x", box[0] + Math.min(share, from) * box[2]);
    cross.setAttribute("d", `M${box[0] + share * box[2]},${box[1]}v${box[3]}`);
  });
  const made = name => chart.appendChild(document.createElementNS(chart.namespaceURI, name));
  const cross = made("path"), mark = made("rect");
  cross.setAttribute("class", "cross");
  mark.setAttribute("class", "mark");
  mark.setAttribute("y", box[1]);
  mark.setAttribute("height", box[3]);

  chart.addEventListener("pointerdown", event => { from = at(event); event.preventDefault(); });
  chart.addEventListener("pointerup", event => {
    const ends = [from ?? 0, at(event)].sort((a, b) => a - b).map(stepAt);
    if (from !== null && (ends[1] - ends[0]) / data.right > 0.01) between(...ends);
    from = null;
    mark.setAttribute("width", 0);
  });
  chart.addEventListener("pointerleave", () => {
    tip.style.display = "none";
    cross.setAttribute("d", "");
    mark.setAttribute("width", 0);
    from = null;
  });
  chart.addEventListener("dblclick", () => zoom([0, 0, SIDE, SIDE]));
}

// A name in a legend hides its curves: below it, or on the whole page.
for (const entry of document.querySelectorAll(".legend [data-name]"))
  entry.addEventListener("click", () => {
    const off = entry.classList.toggle("off");
    const name = CSS.escape(entry.dataset.name);
    const place = entry.closest("figure.group, section") ?? document;
    for (const one of place.querySelectorAll(`path[data-name="${name}"]`))
      one.classList.toggle("off", off);
  });
