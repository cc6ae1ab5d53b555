/* Draws the figures from the numbers in #report-data, and again for another layer, width or colour scheme. All texts of the
   data enter the document by textContent, or escaped by `inert` where Plotly reads a little HTML. */
(() => {
  "use strict";

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const DEFAULT = -1;
  const state = { place: data.best, found: null, expanded: false, colors: null, spaceIsNear: false, spaceIsOld: true };

  // ---- words and colours ----

  const finite = (value) => typeof value === "number";
  const decimal = (value) => (finite(value) ? value.toFixed(Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0).replace("-", "\u2212") : "unknown");
  const percent = (value) => (finite(value) ? `${(100 * value).toFixed(value < 0.0995 && value > 0 ? 1 : 0)}\u00a0%` : "unknown");
  const inert = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function readColors() {
    const style = getComputedStyle(document.documentElement);
    const names = ["card", "ink", "soft", "line", "faint", "assistant", "middle", "role", "accent"];
    state.colors = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    state.colors.font = style.getPropertyValue("--sans").trim();
  }

  function mix(from, to, share) {
    const part = (color, at) => parseInt(color.slice(at, at + 2), 16);
    return `rgb(${[1, 3, 5].map((at) => Math.round(part(from, at) + (part(to, at) - part(from, at)) * share)).join(",")})`;
  }

  /* The two ends of the scale are as far from the mean role as the farthest role of this layer. */
  function colorer(layer) {
    const reach = Math.max(...layer.position.map(Math.abs), 1e-9);
    return (position) => {
      const share = Math.max(-1, Math.min(1, position / reach));
      return mix(state.colors.middle, share < 0 ? state.colors.role : state.colors.assistant, Math.sqrt(Math.abs(share)));
    };
  }

  const hoverText = (layer, index) =>
    index === DEFAULT
      ? `<b>${inert(data.defaultLabel)}</b><br>1.00 along the axis`
      : `<b>${inert(data.names[index])}</b><br>${decimal(layer.position[index])} along the axis<br>${data.rows[index].toLocaleString("en")} rows`;

  /* Keeps a name readable over dots. */
  const halo = () => Array(6).fill(`0 0 2px ${state.colors.card}`).join(", ");

  function frame(more) {
    const { colors } = state;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, separators: ".,",
      font: { family: colors.font, size: 12, color: colors.soft },
      hoverlabel: { bgcolor: colors.card, bordercolor: colors.line, font: { family: colors.font, size: 13, color: colors.ink }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colors.soft, activecolor: colors.accent },
      ...more,
    };
  }

  const settings = (name, buttons = []) => ({
    displaylogo: false, scrollZoom: false, doubleClick: "reset", displayModeBar: buttons.length ? "hover" : false,
    modeBarButtons: [["toImage", ...buttons]], toImageButtonOptions: { format: "svg", filename: `persona-${name}` },
  });

  // ---- the map ----

  const MARGIN = { l: 52, r: 14, t: 12, b: 44 };
  const DOT = data.names.length > 60 ? 8 : 10, DIAMOND = 15;
  const labelFont = (size, bold) => `${bold ? "bold " : ""}${size}px ${state.colors.font}`;
  const ruler = document.createElement("canvas").getContext("2d");

  /* Ranges in which one unit is as long to the right as upwards, so that angles in the map are angles between directions. */
  function equalRanges(xs, ys, width, height) {
    const span = (values) => [Math.min(...values), Math.max(...values)];
    const [x0, x1] = span(xs), [y0, y1] = span(ys);
    const unit = Math.max((x1 - x0) / (width - 2 * Math.min(90, width / 6)), (y1 - y0) / (height - 70), 1e-12);
    const around = (low, high, pixels) => [(low + high) / 2 - (unit * pixels) / 2, (low + high) / 2 + (unit * pixels) / 2];
    return { x: around(x0, x1, width), y: around(y0, y1, height) };
  }

  const SIDES = [
    ["middle right", 1, 0], ["middle left", -1, 0], ["top center", 0, -1], ["bottom center", 0, 1],
    ["top right", 1, -1], ["bottom right", 1, 1], ["top left", -1, -1], ["bottom left", -1, 1],
  ];

  function labelBox(point, side) {
    const [, right, down] = side;
    const gap = point.radius / 0.8 + 1, height = point.size * 1.25;
    const left = right > 0 ? point.x + gap : right < 0 ? point.x - gap - point.width : point.x - point.width / 2;
    const top = down > 0 ? point.y + gap : down < 0 ? point.y - gap - height : point.y - height / 2;
    return { left: left - 2, right: left + point.width + 2, top, bottom: top + height };
  }

  const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

  /* Names beside their dots, the most telling first, each where it covers no other name, no dot and not the arrow. The default
     Assistant always has its name, over as few dots as can be. */
  function placeLabels(points, obstacles, width, height, limit) {
    const dots = points.map(({ x, y, radius }) => ({ left: x - radius, right: x + radius, top: y - radius, bottom: y + radius }));
    const taken = [...obstacles];
    const places = new Map();
    for (const point of points) {
      if (places.size >= limit) break;
      if (point.x < 0 || point.y < 0 || point.x > width || point.y > height) continue;
      const inside = (box) => box.left >= 0 && box.right <= width && box.top >= 0 && box.bottom <= height;
      const clear = (box) => inside(box) && !taken.some((other) => overlap(box, other));
      const covers = (box) => dots.filter((other, index) => points[index] !== point && overlap(box, other)).length;
      const sides = SIDES.filter((side) => clear(labelBox(point, side)));
      const free = point.index === DEFAULT
        ? sides.sort((a, b) => covers(labelBox(point, a)) - covers(labelBox(point, b)))[0]
        : sides.find((side) => !covers(labelBox(point, side)));
      if (free) {
        places.set(point.index, free[0]);
        taken.push(labelBox(point, free));
      }
    }
    return places;
  }

  function mapLabels(layer, ranges, width, height) {
    const toX = (value) => ((value - ranges.x[0]) / (ranges.x[1] - ranges.x[0])) * width;
    const toY = (value) => height - ((value - ranges.y[0]) / (ranges.y[1] - ranges.y[0])) * height;
    const measured = (index, name, x, y, size, bold, radius) => {
      ruler.font = labelFont(size, bold);
      return { index, x: toX(x), y: toY(y), width: ruler.measureText(name).width, size, radius };
    };
    const reach = Math.max(...layer.position.map(Math.abs), 1e-9), rim = Math.max(...layer.x.map((x, index) => Math.hypot(x, layer.y[index])), 1e-9);
    const telling = layer.position.map((position, index) => Math.abs(position) / reach + Math.hypot(layer.x[index], layer.y[index]) / rim);
    const order = [...data.names.keys()].sort((a, b) => telling[b] - telling[a]);
    const points = [
      measured(DEFAULT, data.defaultLabel, layer.default[0], layer.default[1], 13, true, DIAMOND / 2),
      ...order.map((index) => measured(index, data.names[index], layer.x[index], layer.y[index], 11.5, false, DOT / 2)),
    ];
    const tip = points[0];
    const arrow = Array.from({ length: 40 }, (_, step) => {
      const x = toX(0) + ((tip.x - toX(0)) * step) / 40, y = toY(0) + ((tip.y - toY(0)) * step) / 40;
      return { left: x - 4, right: x + 4, top: y - 4, bottom: y + 4 };
    });
    return placeLabels(points, arrow, width, height, Math.max(8, Math.min(60, (width * height) / 11000)));
  }

  const pointAt = (layer, index) => (index === DEFAULT ? layer.default : [layer.x[index], layer.y[index]]);

  function mapTraces(layer, labels) {
    const { colors } = state;
    const color = colorer(layer);
    return [
      {
        type: "scatter", mode: "markers", x: layer.x, y: layer.y, name: "roles", cliponaxis: false,
        hovertext: data.names.map((_, index) => hoverText(layer, index)), hoverinfo: "text",
        marker: { size: DOT, color: layer.position.map(color), line: { width: 1, color: colors.card } },
      },
      {
        type: "scatter", mode: "markers", x: [layer.default[0]], y: [layer.default[1]], name: "default", cliponaxis: false,
        hovertext: [hoverText(layer, DEFAULT)], hoverinfo: "text",
        marker: { size: DIAMOND, symbol: "diamond", color: colors.assistant, line: { width: 2, color: colors.ink } },
      },
      ...nameTraces(layer, labels),
    ];
  }

  /* Names stand in traces of their own, which hold named points only: Plotly does not bring back a text that was empty once. */
  function nameTraces(layer, labels) {
    const { colors } = state;
    const named = [...labels.keys()].filter((index) => index !== state.found);
    const points = named.map((index) => pointAt(layer, index));
    const found = state.found === null ? [] : [pointAt(layer, state.found)];
    const shared = { type: "scatter", mode: "markers+text", hoverinfo: "skip", cliponaxis: false };
    return [
      {
        ...shared, name: "names", x: points.map(([x]) => x), y: points.map(([, y]) => y),
        text: named.map((index) => (index === DEFAULT ? `<b>${inert(data.defaultLabel)}</b>` : inert(data.names[index]))),
        textposition: named.map((index) => labels.get(index)),
        textfont: { size: named.map((index) => (index === DEFAULT ? 13 : 11.5)), color: colors.ink, shadow: halo() },
        marker: { size: named.map((index) => (index === DEFAULT ? DIAMOND : DOT)), opacity: 0 },
      },
      {
        ...shared, name: "found", x: found.map(([x]) => x), y: found.map(([, y]) => y), textposition: "top center",
        text: found.map(() => `<b>${inert(state.found === DEFAULT ? data.defaultLabel : data.names[state.found])}</b>`),
        textfont: { size: 13, color: colors.ink, shadow: halo() },
        marker: { size: DIAMOND + 6, symbol: "circle-open", color: colors.ink, line: { width: 2.5, color: colors.ink } },
      },
    ];
  }

  function mapAxis(layer, component, range) {
    const { colors } = state;
    const share = layer.ratio[component];
    return {
      title: { text: `PC${component + 1}${finite(share) ? `  (${percent(share)} of variance)` : ""}`, standoff: 8 }, range,
      gridcolor: colors.faint, zerolinecolor: colors.line, tickcolor: colors.line, nticks: 7, tickfont: { size: 10.5 }, fixedrange: coarse.matches,
    };
  }

  function drawMap() {
    const layer = data.layers[state.place];
    const host = byId("map");
    const width = host.clientWidth - MARGIN.l - MARGIN.r, height = host.clientHeight - MARGIN.t - MARGIN.b;
    const ranges = equalRanges([...layer.x, layer.default[0], 0], [...layer.y, layer.default[1], 0], width, height);
    const layout = frame({
      margin: MARGIN, width: host.clientWidth, height: host.clientHeight, hovermode: "closest", dragmode: coarse.matches ? false : "zoom",
      xaxis: mapAxis(layer, 0, ranges.x),
      yaxis: { ...mapAxis(layer, 1, ranges.y), scaleanchor: "x" },
      annotations: [{
        x: layer.default[0], y: layer.default[1], ax: 0, ay: 0, xref: "x", yref: "y", axref: "x", ayref: "y", text: "",
        showarrow: true, arrowhead: 2, arrowsize: 1.1, arrowwidth: 2, arrowcolor: state.colors.soft, standoff: 11,
      }],
    });
    const labels = mapLabels(layer, ranges, width, height);
    Plotly.react(host, mapTraces(layer, labels), layout, settings("map", ["zoom2d", "pan2d", "resetScale2d"]));
    host.setAttribute("aria-label", mapWords(layer));
    byId("map-plane").textContent = `${percent(layer.inPlane)} of its length lies in this plane.`;
    if (!host.dataset.listening) {
      host.dataset.listening = "yes";
      host.on("plotly_relayout", drawNames);
    }
  }

  /* Zooming makes room for other names; finding an archetype moves its own. */
  function drawNames() {
    const layer = data.layers[state.place];
    const host = byId("map");
    const ranges = { x: host.layout.xaxis.range, y: host.layout.yaxis.range };
    const labels = mapLabels(layer, ranges, host.clientWidth - MARGIN.l - MARGIN.r, host.clientHeight - MARGIN.t - MARGIN.b);
    const traces = nameTraces(layer, labels);
    const columns = (read) => traces.map(read);
    Plotly.restyle(host, {
      x: columns(({ x }) => x), y: columns(({ y }) => y), text: columns(({ text }) => text), textposition: columns(({ textposition }) => textposition),
      "textfont.size": columns(({ textfont }) => textfont.size), "marker.size": columns(({ marker }) => marker.size),
    }, [2, 3]);
  }

  function mapWords(layer) {
    const ranked = ranking(layer).filter((index) => index !== DEFAULT).map((index) => data.names[index]);
    return `Map of ${data.names.length} archetypes at layer ${layer.layer}. Nearest to the Assistant: ${ranked.slice(0, 3).join(", ")}. Farthest: ${ranked.slice(-3).join(", ")}. The list beside it holds all positions.`;
  }

  // ---- three dimensions ----

  const hasWebgl = (() => {
    const context = document.createElement("canvas").getContext("webgl");
    context?.getExtension("WEBGL_lose_context")?.loseContext();
    return Boolean(context);
  })();

  function spaceTraces(layer) {
    const { colors } = state;
    const color = colorer(layer);
    const ranked = ranking(layer).filter((index) => index !== DEFAULT);
    const named = new Set(ranked.slice(-3));
    const shared = { type: "scatter3d", hoverinfo: "text" };
    const [x, y, z] = layer.default;
    return [
      {
        ...shared, mode: "markers+text", x: layer.x, y: layer.y, z: layer.z, hovertext: data.names.map((_, index) => hoverText(layer, index)),
        text: data.names.map((name, index) => (named.has(index) ? inert(name) : "")), textfont: { size: 11, color: colors.ink }, textposition: "top center",
        marker: { size: data.names.length > 60 ? 4 : 5.5, color: layer.position.map(color), line: { width: 0.5, color: colors.card }, opacity: 1 },
      },
      {
        ...shared, mode: "markers+text", x: [x], y: [y], z: [z], hovertext: [hoverText(layer, DEFAULT)], text: [`<b>${inert(data.defaultLabel)}</b>`],
        textposition: "top center", textfont: { size: 12, color: colors.ink }, marker: { size: 7, symbol: "diamond", color: colors.assistant, line: { width: 1, color: colors.ink } },
      },
      { ...shared, mode: "lines", x: [0, x], y: [0, y], z: [0, z], hoverinfo: "skip", line: { width: 4, color: colors.soft } },
    ];
  }

  function drawSpace() {
    const host = byId("space");
    if (!hasWebgl) {
      host.replaceChildren(message("This browser offers no WebGL, which the third dimension needs. The map shows the first two."));
      return;
    }
    const layer = data.layers[state.place];
    const { colors } = state;
    const side = (component) => ({
      title: { text: `PC${component + 1}` }, gridcolor: colors.line, zerolinecolor: colors.line, showbackground: false, tickfont: { size: 10 }, nticks: 5, showspikes: false,
    });
    const layout = frame({
      margin: { l: 0, r: 0, t: 0, b: 0 }, width: host.clientWidth, height: host.clientHeight, uirevision: "space",
      scene: { xaxis: side(0), yaxis: side(1), zaxis: side(2), aspectmode: "data", camera: { eye: { x: 0.37, y: -1.75, z: 0.74 }, center: { x: 0, y: 0, z: -0.16 } } },
    });
    Plotly.react(host, spaceTraces(layer), layout, settings("space", ["zoom3d", "orbitRotation", "resetCameraDefault3d"]));
    host.setAttribute("aria-label", `The map of layer ${layer.layer} with the third principal component.`);
  }

  function message(text) {
    const paragraph = document.createElement("p");
    paragraph.className = "message";
    paragraph.textContent = text;
    return paragraph;
  }

  // ---- variance, and the lines through the layers ----

  function drawVariance() {
    const layer = data.layers[state.place];
    const { colors } = state;
    const host = byId("variance");
    const numbers = layer.ratio.map((_, index) => index + 1);
    let sum = 0;
    const together = layer.ratio.map((ratio) => (sum += ratio));
    const traces = [
      {
        type: "bar", x: numbers, y: layer.ratio, hoverinfo: "text", hovertext: layer.ratio.map((ratio, index) => `PC${index + 1}: ${percent(ratio)}`),
        text: layer.ratio.map((ratio, index) => (index < 3 ? percent(ratio) : "")), textposition: "outside", textangle: 0, cliponaxis: false, constraintext: "none",
        textfont: { color: colors.ink, size: 12 }, marker: { color: numbers.map((number) => (number === 1 ? colors.assistant : colors.middle)) },
      },
      {
        type: "scatter", mode: "lines+markers", x: numbers.slice(1), y: together.slice(1), hoverinfo: "text", line: { color: colors.soft, width: 1.5 }, marker: { size: 5 },
        hovertext: together.map((share, index) => `first ${index + 1} together: ${percent(share)}`).slice(1),
      },
    ];
    const layout = frame({
      margin: { l: 46, r: 14, t: 18, b: 42 }, width: host.clientWidth, height: host.clientHeight, bargap: 0.25, hovermode: "closest", dragmode: false,
      xaxis: { title: { text: "principal component", standoff: 8 }, fixedrange: true, dtick: numbers.length > 12 ? 2 : 1, tick0: 1, range: [0.4, numbers.length + 0.6] },
      yaxis: { tickformat: ".0%", range: [0, 1.04], gridcolor: colors.faint, fixedrange: true, zerolinecolor: colors.line },
    });
    Plotly.react(host, traces, layout, settings("variance"));
    host.setAttribute("aria-label", `Variance explained at layer ${layer.layer}: PC1 ${percent(layer.ratio[0])}, first three ${percent(together[Math.min(2, together.length - 1)])}.`);
  }

  const LINES = [
    ["line-cos", "cosine of PC1 and axis", (layer) => layer.cos, decimal, [-0.04, 1.06]],
    ["line-ratio", "PC1's share of variance", (layer) => layer.ratio[0], percent, null],
    ["line-separation", "separation", (layer) => layer.separation, decimal, null],
    ["line-norm", "length of the axis", (layer) => layer.norm, decimal, null],
  ];

  function drawLine([id, words, read, say, range]) {
    const { colors } = state;
    const host = byId(id);
    const values = data.layers.map(read);
    if (!values.some(finite)) {
      host.replaceChildren(message("Not known for this store."));
      return;
    }
    const layers = data.layers.map((layer) => layer.layer);
    const top = Math.max(...values.filter(finite));
    const many = layers.length > 30;
    const traces = [
      {
        type: "scatter", mode: "lines+markers", x: layers, y: values, hoverinfo: "text", line: { color: colors.middle, width: 1.75 },
        hovertext: values.map((value, place) => `layer ${layers[place]}: ${say(value)}`),
        marker: { size: many ? 4 : 6, opacity: 1, color: colors.middle },
      },
      {
        type: "scatter", mode: "markers", x: [layers[state.place]], y: [values[state.place]], hoverinfo: "skip", marker: { size: 11, color: colors.accent },
      },
      {
        type: "scatter", mode: "markers", x: [layers[data.best]], y: [values[data.best]], hoverinfo: "skip",
        marker: { size: 17, symbol: "circle-open", color: colors.ink, line: { width: 1.5 } },
      },
    ];
    const layout = frame({
      margin: { l: 42, r: 12, t: 10, b: 26 }, width: host.clientWidth, height: host.clientHeight, hovermode: "closest", dragmode: false, hoverdistance: 40,
      xaxis: { fixedrange: true, gridcolor: "rgba(0,0,0,0)", zeroline: false, nticks: 8, ...(layers.length < 10 ? { tickvals: layers } : {}) },
      yaxis: { fixedrange: true, gridcolor: colors.faint, zerolinecolor: colors.line, nticks: 4, range: range ?? [Math.min(0, ...values.filter(finite)) - top * 0.04, top * 1.16], ...(say === percent ? { tickformat: ".0%" } : {}) },
    });
    Plotly.react(host, traces, layout, settings(id));
    host.setAttribute("aria-label", `${words} by layer; at layer ${layers[state.place]}: ${say(values[state.place])}.`);
    if (!host.dataset.listening) {
      host.dataset.listening = "yes";
      host.on("plotly_click", (event) => select(event.points[0].pointIndex));
    }
  }

  // ---- other persona spaces ----

  const MAX_NAMED = 40;

  function drawComparison(pair, number) {
    const { colors } = state;
    const host = byId(`compare-${number}`);
    const ends = [Math.min(...pair.x, ...pair.y, 0), Math.max(...pair.x, ...pair.y, 1)];
    const where = (name, x, y) => `<b>${inert(name)}</b><br>${decimal(x)} here<br>${decimal(y)} there`;
    const traces = [
      { type: "scatter", mode: "lines", x: ends, y: ends, hoverinfo: "skip", line: { color: colors.line, width: 1.5, dash: "dot" } },
      {
        type: "scatter", mode: pair.names.length > MAX_NAMED ? "markers" : "markers+text", x: pair.x, y: pair.y, hoverinfo: "text",
        hovertext: pair.names.map((name, index) => where(name, pair.x[index], pair.y[index])), text: pair.names.map(inert),
        textposition: "top center", textfont: { size: 11, color: colors.soft }, marker: { size: 8, color: colors.accent, line: { width: 1, color: colors.card } },
      },
      {
        type: "scatter", mode: "markers", x: [1], y: [1], hoverinfo: "text", hovertext: [where("default Assistant", 1, 1)],
        marker: { size: 12, symbol: "diamond", color: colors.assistant, line: { width: 1.5, color: colors.ink } },
      },
    ];
    const side = (title) => ({ title: { text: inert(title), standoff: 8 }, gridcolor: colors.faint, zerolinecolor: colors.line, nticks: 6 });
    const layout = frame({
      margin: { l: 58, r: 14, t: 12, b: 46 }, width: host.clientWidth, height: host.clientHeight, hovermode: "closest", dragmode: "pan",
      xaxis: side(pair.xTitle), yaxis: side(pair.yTitle),
    });
    Plotly.react(host, traces, layout, settings("comparison", ["zoomIn2d", "zoomOut2d", "resetScale2d"]));
    host.setAttribute("aria-label", `Places of ${pair.names.length} archetypes along two axes: ${pair.xTitle} and ${pair.yTitle}.`);
  }

  // ---- the ranking ----

  const ENDS = 12;
  const positionOf = (layer, index) => (index === DEFAULT ? 1 : layer.position[index]);
  const ranking = (layer) => [DEFAULT, ...data.names.keys()].sort((a, b) => positionOf(layer, b) - positionOf(layer, a));

  function drawRanking() {
    const layer = data.layers[state.place];
    const ranked = ranking(layer);
    const low = Math.min(...layer.position, 0), high = Math.max(...layer.position, 1);
    const pad = (high - low) * 0.04;
    const scale = (value) => (100 * (value - low + pad)) / (high - low + 2 * pad);
    const short = ranked.length > 2.5 * ENDS && !state.expanded;
    const shown = short ? ranked.filter((index, place) => place < ENDS || place >= ranked.length - ENDS || index === state.found) : ranked;
    const rows = shown.map((index) => rankRow(layer, index, scale, colorer(layer)));
    if (short) rows.splice(ENDS, 0, moreRow(ranked.length - 2 * ENDS));
    byId("rank").replaceChildren(...rows);
    const marks = element("div", "marks");
    marks.append(...[[0, "mean"], [1, "default"]].map(([value, text]) => {
      const mark = element("span", "", text);
      mark.style.left = `${scale(value)}%`;
      return mark;
    }));
    byId("rank-scale").replaceChildren(element("span"), marks, element("span"));
  }

  function rankRow(layer, index, scale, color) {
    const position = positionOf(layer, index);
    const row = element("li", index === DEFAULT ? "is-default" : "");
    const name = element("span", "name", index === DEFAULT ? data.defaultName : data.names[index]);
    name.title = name.textContent;
    const track = element("span", "track"), zero = element("span", "zero"), stem = element("span", "stem"), dot = element("span", "dot");
    zero.style.left = `${scale(0)}%`;
    stem.style.left = `${scale(Math.min(0, position))}%`;
    stem.style.width = `${Math.abs(scale(position) - scale(0))}%`;
    dot.style.left = `${scale(position)}%`;
    stem.style.background = dot.style.background = index === DEFAULT ? state.colors.assistant : color(position);
    track.append(zero, stem, dot);
    row.append(name, track, element("span", "value", decimal(position)));
    row.classList.toggle("found", index === state.found);
    row.addEventListener("mouseenter", () => find(index));
    row.addEventListener("mouseleave", () => find(searched()));
    return row;
  }

  function moreRow(number) {
    const row = element("li", "more");
    const button = element("button", "", `Show the ${number} between`);
    button.type = "button";
    button.addEventListener("click", () => {
      state.expanded = true;
      drawRanking();
      byId("rank").focus();
    });
    row.append(button);
    return row;
  }

  function element(tag, className = "", text = "") {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  }

  function searched() {
    const wanted = byId("find").value.trim().toLowerCase();
    if (!wanted) return null;
    if (wanted === data.defaultName.toLowerCase()) return DEFAULT;
    const exact = data.names.findIndex((name) => name.toLowerCase() === wanted);
    const place = exact >= 0 ? exact : data.names.findIndex((name) => name.toLowerCase().startsWith(wanted));
    return place >= 0 ? place : null;
  }

  /* Marks an archetype in the map. */
  function find(index) {
    if (index === state.found) return;
    state.found = index;
    drawNames();
  }

  // ---- the layer ----

  function select(place) {
    state.place = place;
    drawBar();
    drawFigures();
  }

  function drawBar() {
    const layer = data.layers[state.place];
    const slider = byId("layer");
    const isBest = state.place === data.best;
    slider.value = String(state.place);
    slider.setAttribute("aria-valuetext", `layer ${layer.layer}${isBest ? ", the best" : ""}`);
    byId("layer-number").textContent = String(layer.layer);
    const best = byId("best-button");
    best.textContent = isBest ? "the best layer" : `Best: ${data.layers[data.best].layer}`;
    best.disabled = isBest;
    const facts = [
      ["cos(PC1, axis)", decimal(layer.cos)], ["PC1", percent(layer.ratio[0])],
      ["|axis|", decimal(layer.norm), "minor"], ["separation", decimal(layer.separation), "minor"],
    ];
    byId("layer-facts").replaceChildren(...facts.map(([term, value, rank]) => {
      const pair = element("div", rank);
      pair.append(element("dt", "", term), element("dd", "", value));
      return pair;
    }));
  }

  function drawTicks() {
    const last = data.layers.length - 1;
    const step = Math.max(1, Math.ceil(last / 8));
    const near = (place) => Math.abs(place - data.best) < step / 2 && place !== data.best;
    const places = data.layers.map((_, place) => place).filter((place) => place === data.best || (place % step === 0 && !near(place)));
    byId("ticks").replaceChildren(...places.map((place) => {
      const tick = element("span", place === data.best ? "best" : "", String(data.layers[place].layer));
      tick.style.left = `${last ? (100 * place) / last : 50}%`;
      tick.addEventListener("click", () => select(place));
      return tick;
    }));
  }

  function drawFigures() {
    drawMap();
    drawRanking();
    drawVariance();
    LINES.forEach(drawLine);
    state.spaceIsOld = true;
    drawSpaceIfSeen();
  }

  /* WebGL is slow to begin, so it begins when the reader comes near. */
  function drawSpaceIfSeen() {
    if (!state.spaceIsOld || !state.spaceIsNear) return;
    state.spaceIsOld = false;
    drawSpace();
  }

  function redraw() {
    readColors();
    drawBar();
    drawFigures();
    data.comparisons.forEach((pair, number) => pair.names.length && drawComparison(pair, number));
  }

  function start() {
    const slider = byId("layer");
    slider.max = String(data.layers.length - 1);
    slider.disabled = data.layers.length === 1;
    slider.addEventListener("input", () => select(Number(slider.value)));
    byId("best-button").addEventListener("click", () => select(data.best));
    byId("find").addEventListener("input", () => {
      find(searched());
      drawRanking();
      byId("rank").querySelector(".found")?.scrollIntoView({ block: "nearest" });
    });
    byId("names").append(...[data.defaultName, ...data.names].map((name) => Object.assign(element("option"), { value: name })));
    drawTicks();
    redraw();
    new IntersectionObserver((entries) => {
      state.spaceIsNear = entries.at(-1).isIntersecting;
      drawSpaceIfSeen();
    }, { rootMargin: "200px" }).observe(byId("space"));
    dark.addEventListener("change", redraw);
    let width = innerWidth, waiting = 0;
    addEventListener("resize", () => {
      if (innerWidth === width) return;
      width = innerWidth;
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(redraw);
    });
    const forPrint = (printing) => () => {
      document.documentElement.classList.toggle("printing", printing);
      redraw();
    };
    addEventListener("beforeprint", forPrint(true));
    addEventListener("afterprint", forPrint(false));
  }

  start();
})();
