"use strict";
// Figures: plain functions from numbers and a theme to what Plotly draws. They keep no state and touch no document.

const Plots = (() => {
  const NARROW = 560;
  const FONT = '-apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif';

  // Plotly reads some markup in texts; names of variants, metrics and layers are only ever text.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // Four significant digits, thousands in groups, a real minus sign: the same rule as in wording.py.
  function number(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(Number(value.toPrecision(4)));
    let text;
    if (Number.isInteger(value) && size < 1e15) text = value.toLocaleString("en-US");
    else if (size >= 1e-3 && size < 1e15) {
      const digits = Math.max(3 - Math.floor(Math.log10(size)), 0);
      text = value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    } else text = value.toExponential(3).replace("e+", "e");
    return text.replace(/-/g, "−");
  }

  // Numbers of one column: with the same decimals where that leaves each at least two digits.
  function column(values) {
    const seen = finite(values).filter((v) => v !== 0).map(Math.abs);
    const [low, high] = [least(seen), most(seen)];
    if (!seen.length || seen.every(Number.isInteger) || high >= 1000 || high < 1e-3 || low < high / 200) return number;
    const digits = 3 - Math.floor(Math.log10(Number(high.toPrecision(4))));
    return (v) => (typeof v === "number" ? v.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace(/-/g, "−") : number(v));
  }

  const finite = (values) => values.filter((v) => typeof v === "number" && Number.isFinite(v));
  const least = (values) => values.reduce((a, b) => (b < a ? b : a), Infinity);
  const most = (values) => values.reduce((a, b) => (b > a ? b : a), -Infinity);
  const shorter = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

  // Large numbers as 200k, small ones as powers of ten.
  const exponents = (values) => ({ exponentformat: most(finite(values).map(Math.abs)) >= 1e4 ? "SI" : "power" });

  const axis = (theme, more = {}) => ({
    gridcolor: theme.rule, linecolor: theme.axis, zeroline: false, ticks: "", tickfont: { color: theme.soft, size: 12 }, automargin: true, fixedrange: true,
    ...more,
    title: { text: safe(more.title || ""), font: { color: theme.soft, size: 13 }, standoff: 10 },
  });

  const layout = (theme, more = {}) => ({
    autosize: true, showlegend: false, hovermode: "closest", dragmode: false, separators: ".,",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: FONT, size: 13, color: theme.ink },
    hoverlabel: { bgcolor: theme.sheet, bordercolor: theme.axis, font: { family: FONT, size: 13, color: theme.ink }, align: "left" },
    ...more, margin: { l: 4, r: 12, t: 8, b: 46, ...more.margin },
  });

  // Ticks at 1, 2 or 5 times a power of ten, all with the same decimals.
  function ticks(range, count) {
    const rough = (range[1] - range[0]) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * (1 - 1e-9));
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const first = Math.ceil(range[0] / step - 1e-9);
    const tickvals = Array.from({ length: Math.floor(range[1] / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
    const plain = digits <= 6 && most(tickvals.map(Math.abs)) < 1e7;
    const format = (v) => (plain ? v.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : v === 0 ? "0" : v.toExponential(1));
    return { range, tickvals, ticktext: tickvals.map((v) => format(v).replace(/^-(0[.0]*)$/, "$1").replace(/-/g, "−")) };
  }

  function padded(values, share) {
    const [low, high] = [least(values), most(values)];
    const pad = (high - low || Math.abs(high) || 1) * share;
    return [low - pad, high + pad];
  }

  const note = (theme, text, more) => ({ text, showarrow: false, font: { size: 12, color: theme.soft }, xref: "paper", yref: "paper", ...more });
  const colourOf = (theme, variant) => theme.variants[variant.colour % theme.variants.length];
  const dashOf = (variant) => ["solid", "dash", "dot", "dashdot"][Math.floor(variant.colour / 8) % 4];

  // Dots for seeds, a bar for the interval, an upright mark for the mean; every row at its own height.
  function dots(theme, rows, mark = 24) {
    const traces = [];
    rows.forEach((row, i) => {
      const y = rows.length - 1 - i;
      const spread = row.points.length > 1 ? 0.3 / (row.points.length - 1) : 0;
      const said = (text) => `${safe(row.name)}<br>${text}`;
      if (row.ci) {
        traces.push({ type: "scatter", mode: "lines", x: row.ci, y: [y, y], line: { color: row.colour, width: 9 }, opacity: 0.28, hoverinfo: "text",
          text: said(`95 % interval ${number(row.ci[0])} to ${number(row.ci[1])}`) });
      }
      traces.push({ type: "scatter", mode: "markers", x: row.points.map((p) => p.value),
        y: row.points.map((_, k) => y + (row.points.length > 1 ? 0.15 - k * spread : 0)), hoverinfo: "text",
        text: row.points.map((p) => said(`seed ${safe(p.seed)}: ${number(p.value)}`)),
        marker: { color: row.colour, size: 9, opacity: 0.8, line: { color: theme.paper, width: 1 } } });
      if (row.mean !== null && row.mean !== undefined) {
        traces.push({ type: "scatter", mode: "markers", x: [row.mean], y: [y], hoverinfo: "text", text: said(`mean ${number(row.mean)}`),
          marker: { symbol: "line-ns-open", color: row.colour, size: mark, line: { width: 3, color: row.colour } } });
      }
    });
    return traces;
  }

  function result(theme, rows, label, width) {
    const narrow = width < NARROW;
    const high = narrow ? 62 : 46;
    const above = rows.map((row, i) => note(theme, safe(shorter(row.name, Math.floor(width / 8))), {
      xref: "paper", x: 0, xanchor: "left", yref: "y", y: rows.length - 1 - i + 0.27, yanchor: "bottom", font: { size: 13, color: theme.ink } }));
    return {
      data: dots(theme, rows, narrow ? 18 : 24),
      layout: layout(theme, {
        height: rows.length * high + 66,
        annotations: narrow ? above : [],
        xaxis: axis(theme, { title: label, showline: true, ...ticks(padded(finite(rows.flatMap((r) => [...r.points.map((p) => p.value), ...(r.ci || [])])), 0.05), narrow ? 5 : 10) }),
        yaxis: axis(theme, { showgrid: false, tickvals: rows.map((_, i) => rows.length - 1 - i),
          ticktext: rows.map((row) => safe(shorter(row.name, 34)) + "  "), range: [-0.55, rows.length - (narrow ? 0.3 : 0.45)], showticklabels: !narrow, tickfont: { color: theme.ink, size: 13 } }),
      }),
    };
  }

  // The paired difference: zero in sight, the claimed side shaded and named.
  function difference(theme, delta, colour, width) {
    const points = Object.entries(delta.pairs).map(([seed, value]) => ({ seed, value }));
    const all = finite([0, delta.mean, ...(delta.ci95 || []), ...points.map((p) => p.value)]);
    const range = padded(all, 0.12);
    const lower = delta.direction === "lower";
    // With zero near the edge the claimed side would be a sliver: make it wide enough to be seen.
    const side = (range[1] - range[0]) * 0.18;
    if (lower) range[0] = Math.min(range[0], -side);
    else range[1] = Math.max(range[1], side);
    const rows = [{ name: `${delta.method} minus ${delta.baseline}`, colour, points, mean: delta.mean, ci: delta.ci95 }];
    const words = width < NARROW ? "better" : `${safe(shorter(delta.method, 24))} better`;
    return {
      data: dots(theme, rows),
      layout: layout(theme, {
        height: 142, margin: { t: 26 },
        shapes: [
          { type: "rect", xref: "x", yref: "paper", x0: lower ? range[0] : 0, x1: lower ? 0 : range[1], y0: 0, y1: 1, fillcolor: theme.shade, line: { width: 0 }, layer: "below" },
          { type: "line", xref: "x", yref: "paper", x0: 0, x1: 0, y0: 0, y1: 1, line: { color: theme.ink, width: 1 } },
        ],
        annotations: [note(theme, lower ? `← ${words}` : `${words} →`, { x: lower ? 0 : 1, xanchor: lower ? "left" : "right", y: 1, yanchor: "bottom", yshift: 3 })],
        xaxis: axis(theme, { title: `${delta.metric}: ${width < NARROW ? "difference" : rows[0].name}`, showline: true, ...ticks(range, width < NARROW ? 5 : 10) }),
        yaxis: axis(theme, { range: [-0.6, 0.6], showgrid: false, showticklabels: false }),
      }),
    };
  }

  // One metric against another, a dot for every seed of every variant; hollow where it does not count.
  function relation(theme, found, points, width) {
    const data = points.map((p) => ({ type: "scatter", mode: "markers", x: [p.x], y: [p.y], hoverinfo: "text",
      text: `${safe(p.variant.name)}, seed ${safe(p.seed)}<br>${safe(found.x)}: ${number(p.x)}<br>${safe(found.y)}: ${number(p.y)}`,
      marker: { size: 9, symbol: p.counts ? "circle" : "circle-open", color: colourOf(theme, p.variant), opacity: 0.85, line: { width: 1.5, color: p.counts ? theme.paper : colourOf(theme, p.variant) } } }));
    const count = width < NARROW ? 5 : 9;
    return { data, layout: layout(theme, { height: width < NARROW ? 300 : 360, margin: { t: 28 },
      annotations: [note(theme, safe(found.y), { x: 0, xanchor: "left", y: 1, yanchor: "bottom", yshift: 6, font: { size: 13, color: theme.soft } })],
      xaxis: axis(theme, { title: found.x, showline: true, ...ticks(padded(points.map((p) => p.x), 0.05), count) }), yaxis: axis(theme, { ...ticks(padded(points.map((p) => p.y), 0.06), 6) }) }) };
  }

  // found.points: [{variant, x, y, plan}]; found.line: {x, y}; found.targets: sizes that were asked for.
  function front(theme, found, width) {
    const [narrow, least] = [width < NARROW, 1e-4];
    const drawn = (y) => Math.max(y, least);
    const data = [
      { type: "scatter", mode: "lines", x: found.line.x, y: found.line.y.map(drawn), hoverinfo: "skip", line: { color: theme.soft, width: 1.4 } },
      ...found.points.map((p) => ({ type: "scatter", mode: "markers", x: [p.x], y: [drawn(p.y)], hoverinfo: "text",
        text: `${safe(p.variant.name)}${p.plan ? ", the plan" : ""}<br>size: ${number(p.x)}<br>added loss: ${number(p.y)}`,
        marker: { size: p.plan ? 15 : 8, symbol: p.plan ? "circle-open" : "circle", color: colourOf(theme, p.variant), line: { width: p.plan ? 2.5 : 1.5, color: p.plan ? colourOf(theme, p.variant) : theme.paper } } })),
    ];
    return { data, layout: layout(theme, { height: narrow ? 340 : 420, margin: { t: 28 },
      shapes: found.targets.map((x) => ({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: theme.axis, width: 1, dash: "dot" } })),
      annotations: [note(theme, "held-out loss added, log scale", { x: 0, xanchor: "left", y: 1, yanchor: "bottom", yshift: 6, font: { size: 13, color: theme.soft } })],
      xaxis: axis(theme, { title: "bytes of the weights, of the model as it is", showline: true, ...ticks(padded([...found.points.map((p) => p.x), ...found.targets], 0.05), narrow ? 5 : 9) }),
      yaxis: axis(theme, { type: "log", exponentformat: "power", dtick: 1 }) }) };
  }

  // lines: [{variant, name, seed (null: the mean), x, y}]; marks: [{x, text}] where stages begin.
  function curves(theme, lines, marks, options) {
    const data = lines.map((line) => ({
      type: "scatter", mode: line.x.length === 1 ? "markers" : "lines", x: line.x, y: line.y, connectgaps: false,
      name: safe(line.seed === null ? line.variant.name : `${line.variant.name}, seed ${line.seed}`),
      hoverinfo: line.bold ? "x+text" : "skip", text: line.bold ? line.y.map((y) => `${safe(shorter(line.variant.name, 40))}  ${number(y)}`) : undefined,
      opacity: line.bold ? 1 : 0.45, line: { color: colourOf(theme, line.variant), width: line.bold ? 2.4 : 1, dash: dashOf(line.variant) },
      marker: { color: colourOf(theme, line.variant), size: line.bold ? 8 : 5 },
    }));
    return {
      data,
      layout: layout(theme, {
        height: options.width < NARROW ? 320 : 420, margin: { t: 30 }, hovermode: "x unified", dragmode: options.fine ? "zoom" : false,
        shapes: marks.filter((m) => m.x > 0).map((m) => ({ type: "line", xref: "x", yref: "paper", x0: m.x, x1: m.x, y0: 0, y1: 1, line: { color: theme.axis, width: 1, dash: "dot" } })),
        annotations: [
          note(theme, safe(options.metric + (options.log ? ", log scale" : "")), { x: 0, xanchor: "left", y: 1, yanchor: "bottom", yshift: marks.length ? 18 : 6, font: { size: 13, color: theme.soft } }),
          ...marks.map((m) => note(theme, safe(shorter(m.text, 18)), { xref: "x", x: m.x, xanchor: "left", xshift: 3, y: 1, yanchor: "bottom", yshift: 1 })),
        ],
        ...(marks.length ? { margin: { t: 46 } } : {}),
        xaxis: axis(theme, { title: options.axis, showline: true, fixedrange: !options.fine, exponentformat: "SI", unifiedhovertitle: { text: `${options.axis} %{x:,.5~r}` }, nticks: options.width < NARROW ? 5 : 9, rangemode: "tozero" }),
        yaxis: axis(theme, { type: options.log ? "log" : "linear", fixedrange: !options.fine, ...exponents(lines.flatMap((l) => l.y)), nticks: 7 }),
      }),
    };
  }

  const colorbar = (theme, narrow, more = {}) => ({
    thickness: 10, outlinewidth: 0, tickfont: { color: theme.soft, size: 12 }, nticks: 5, exponentformat: "power",
    ...(narrow ? { orientation: "h", x: 0.5, y: 1, yanchor: "bottom", len: 1, ypad: 4 } : { len: 1, x: 1.01, xpad: 6 }), ...more,
  });
  const scale = (colours) => colours.map((colour, i) => [i / (colours.length - 1), colour]);

  // The colours and limits for values: through a neutral zero when they have both signs.
  function coloured(theme, values, plain = false) {
    const seen = finite(values);
    const [low, high] = seen.length ? [least(seen), most(seen)] : [0, 1];
    if (!plain && low < 0 && high > 0) {
      const far = Math.max(-low, high);
      return { colorscale: scale(theme.split), zmin: -far, zmax: far };
    }
    return { colorscale: scale(theme.ramp), zmin: low, zmax: high > low ? high : low + (Math.abs(low) || 1) * 1e-9 };
  }

  function blend(colours, share) {
    const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
    const i = Math.min(Math.floor(place), colours.length - 2);
    const channel = (text, k) => parseInt(text.slice(1 + 2 * k, 3 + 2 * k), 16);
    const mixed = [0, 1, 2].map((k) => Math.round(channel(colours[i], k) + (place - i) * (channel(colours[i + 1], k) - channel(colours[i], k))));
    return `rgb(${mixed.join(",")})`;
  }

  // Texts for the cells of a heat map, each dark or light, whichever stands out from its cell.
  function written(theme, x, y, values, colours, yaxis) {
    const at = { x: [], y: [], text: [], colour: [] };
    values.forEach((row, i) => row.forEach((value, j) => {
      if (value === null) return;
      const share = (value - colours.zmin) / (colours.zmax - colours.zmin);
      const luminance = blend(colours.colorscale.map((c) => c[1]), share).match(/\d+/g).map((c) => ((c / 255 + 0.055) / 1.055) ** 2.4).reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
      at.x.push(x[j]);
      at.y.push(y[i]);
      at.text.push(number(value));
      at.colour.push(luminance > 0.18 ? "#11161c" : "#ffffff");
    }));
    return { type: "scatter", mode: "text", x: at.x, y: at.y, text: at.text, textfont: { size: 11.5, color: at.colour }, hoverinfo: "skip", cliponaxis: false, ...(yaxis ? { yaxis } : {}) };
  }

  const fits = (texts, cell) => cell >= most(texts.map((t) => t.length)) * 6.4 + 8;

  const layerName = (label) => (/^\d+$/.test(label) ? `layer ${label}` : safe(label));

  // As many layer labels as fit; the ends keep theirs, shortened where cells are narrow.
  function layerTicks(labels, cell) {
    const every = Math.max(1, Math.ceil(26 / cell));
    const short = { embedding: "emb." };
    const places = labels.map((label, i) => i);
    const words = places.filter((i) => !/^\d+$/.test(labels[i]));
    const crowded = (i) => words.some((j) => Math.abs(i - j) * cell < 34);
    const shown = places.filter((i) => words.includes(i) || (Number(labels[i]) % every === 0 && !crowded(i)));
    // Values are names here: a number would count as the layer of that name, not as a place.
    return { tickangle: 0, tickvals: shown.map((i) => safe(labels[i])), ticktext: shown.map((i) => (cell < 64 && short[labels[i]]) || safe(shorter(labels[i], Math.max(4, Math.floor(cell / 7))))) };
  }

  // One strip for each column of a per-layer table, coloured over its own range.
  function strips(theme, table, width) {
    const strip = 30, gap = 32, foot = 44;
    const n = table.columns.length;
    const inner = n * (strip + gap);
    const labels = table.layers.map(safe);
    const cell = (width - 16) / labels.length;
    const data = [], annotations = [], axes = {};
    table.columns.forEach((column, k) => {
      const top = 1 - (k * (strip + gap) + gap) / inner;
      const name = k ? `y${k + 1}` : "y";
      axes[k ? `yaxis${k + 1}` : "yaxis"] = { domain: [Math.max(top - strip / inner, 0), top], showticklabels: false, showgrid: false, zeroline: false, fixedrange: true, ticks: "" };
      const texts = column.values.map(number);
      const colours = coloured(theme, column.values);
      data.push({ type: "heatmap", x: labels, y: [0], z: [column.values], yaxis: name, xgap: 2, ygap: 0, showscale: false, hoverongaps: false, ...colours, hoverinfo: "text",
        hovertext: [texts.map((text, i) => `${layerName(table.layers[i])}<br>${safe(column.name)}: ${text}`)] });
      if (fits(texts, cell)) data.push(written(theme, labels, [0], [column.values], colours, name));
      const seen = finite(column.values);
      annotations.push(note(theme, safe(column.name), { x: 0, xanchor: "left", y: top, yanchor: "bottom", yshift: 1, font: { size: 13, color: theme.ink } }));
      annotations.push(note(theme, seen.length ? `${number(least(seen))} to ${number(most(seen))}` : "", { x: 1, xanchor: "right", y: top, yanchor: "bottom", yshift: 1 }));
    });
    return { data, layout: layout(theme, { height: inner + foot, margin: { l: 2, r: 2, t: 0, b: foot }, annotations, ...axes,
      xaxis: axis(theme, { type: "category", title: "layer", showgrid: false, anchor: n > 1 ? `y${n}` : "y", automargin: false, ...layerTicks(table.layers, cell) }) }) };
  }

  // The same columns as small charts, one line for each variant.
  function profiles(theme, table, width) {
    const high = 104, gap = 36, foot = 44;
    const n = table.columns.length;
    const inner = n * (high + gap);
    const data = [], annotations = [], axes = {};
    table.columns.forEach((name, k) => {
      const top = 1 - (k * (high + gap) + gap) / inner;
      const seen = table.variants.flatMap((entry) => entry.columns.filter((c) => c.name === name).flatMap((c) => c.values));
      axes[k ? `yaxis${k + 1}` : "yaxis"] = axis(theme, { domain: [Math.max(top - high / inner, 0), top], nticks: 4, ...exponents(seen) });
      annotations.push(note(theme, safe(name), { x: 0, xanchor: "left", y: top, yanchor: "bottom", yshift: 6, font: { size: 13, color: theme.ink } }));
      [...table.variants].reverse().forEach((entry) => { // the first variant lies on top
        const column = entry.columns.find((c) => c.name === name);
        if (!column) return;
        const colour = colourOf(theme, entry.variant);
        data.push({ type: "scatter", mode: "lines+markers", x: entry.layers.map(safe), y: column.values, yaxis: k ? `y${k + 1}` : "y", hoverinfo: "text",
          text: column.values.map((v, i) => `${safe(entry.variant.name)}, ${layerName(entry.layers[i])}<br>${safe(name)}: ${number(v)}`),
          line: { color: colour, width: 1.8, dash: dashOf(entry.variant) }, marker: { color: colour, size: 6 } });
      });
    });
    return { data, layout: layout(theme, { height: inner + foot, margin: { l: 4, r: 10, t: 0, b: foot }, annotations, ...axes,
      xaxis: axis(theme, { type: "category", categoryorder: "array", categoryarray: table.order.map(safe), title: "layer", anchor: n > 1 ? `y${n}` : "y", automargin: false, showgrid: false, ...layerTicks(table.order, (width - 60) / table.order.length) }) }) };
  }

  function matrix(theme, found, width) {
    const narrow = width < NARROW;
    const flat = found.values.flat();
    const texts = flat.filter((v) => v !== null).map(number);
    const colours = coloured(theme, flat);
    const [x, y] = [found.x.map(safe), found.y.map(safe)];
    const wide = Math.min(width - (narrow ? 60 : 140), 760);
    const cell = wide / found.x.length;
    const high = Math.min(Math.max(found.y.length * Math.min(cell, 38), 120), 620);
    const hover = found.values.map((row, i) => row.map((v, j) => (v === null ? "" : `${safe(found.x_label)} ${safe(found.x[j])}, ${safe(found.y_label)} ${safe(found.y[i])}<br>${number(v)}`)));
    const shown = fits(texts, cell) && high / y.length >= 18;
    return {
      data: [{ type: "heatmap", x, y, z: found.values, xgap: 1, ygap: 1, hoverongaps: false, ...colours, colorbar: colorbar(theme, narrow), hoverinfo: "text", hovertext: hover },
        ...(shown ? [written(theme, x, y, found.values, colours)] : [])],
      layout: layout(theme, { height: high + (narrow ? 104 : 66), ...(width > 900 ? { width: 900, autosize: false } : {}), margin: { t: 6 },
        xaxis: axis(theme, { type: "category", title: found.x_label, showgrid: false, tickangle: 0 }), yaxis: axis(theme, { type: "category", title: found.y_label, showgrid: false }) }),
    };
  }

  // Decades for a colour bar over logarithms, with halves in between when there are few.
  function decades(low, high) {
    const ticks = [];
    const inside = high - low < 2.5 ? [1, 2, 5] : [1];
    for (let e = Math.floor(low); e <= Math.ceil(high); e++) {
      for (const m of inside) if (e + Math.log10(m) >= low - 1e-9 && e + Math.log10(m) <= high + 1e-9) ticks.push(e + Math.log10(m));
    }
    return { tickvals: ticks, ticktext: ticks.map((t) => String(Number((10 ** t).toPrecision(2)))) };
  }

  // series: {labels, x, values[layer][point]}, the lowest layer first.
  function seriesHeat(theme, series, options) {
    const narrow = options.width < NARROW;
    const z = options.log ? series.values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : series.values;
    const colours = coloured(theme, z.flat(), options.log);
    const hover = series.values.map((row, i) => row.map((v, j) => `${layerName(series.labels[i])}, ${safe(options.axis)} ${number(series.x[j])}<br>${safe(options.metric)}: ${number(v)}`));
    return {
      data: [{ type: "heatmap", x: series.x, y: series.labels.map(safe), z, ygap: 1, hoverongaps: false, ...colours, hoverinfo: "text", hovertext: hover,
        colorbar: colorbar(theme, narrow, options.log ? decades(colours.zmin, colours.zmax) : {}) }],
      layout: layout(theme, { height: Math.min(Math.max(series.labels.length * 26, 150), 640) + (narrow ? 100 : 60), margin: { t: 6 },
        xaxis: axis(theme, { title: options.axis, showgrid: false, exponentformat: "SI", nticks: narrow ? 5 : 9, ...(series.x.length < 4 ? { tickvals: series.x } : {}) }), yaxis: axis(theme, { type: "category", title: "layer", showgrid: false }) }),
    };
  }

  function seriesLines(theme, series, options) {
    const narrow = options.width < NARROW;
    const inner = series.labels.filter((label) => /^\d+$/.test(label));
    const last = Math.max(inner.length - 1, 1);
    const data = series.labels.map((label, i) => {
      const place = inner.indexOf(label);
      return { type: "scatter", mode: series.x.length === 1 ? "markers" : "lines", x: series.x, y: series.values[i], hoverinfo: "text",
        text: series.values[i].map((v, j) => `${layerName(label)}, ${safe(options.axis)} ${number(series.x[j])}<br>${safe(options.metric)}: ${number(v)}`),
        line: place >= 0 ? { color: blend(theme.ramp, 0.35 + (0.65 * place) / last), width: 1.8 } : { color: theme.soft, width: 1.4, dash: label === "head" ? "dot" : "dash" },
        marker: { color: place >= 0 ? blend(theme.ramp, 0.35 + (0.65 * place) / last) : theme.soft } };
    });
    if (inner.length > 1) {
      data.push({ type: "scatter", mode: "markers", x: [null], y: [null], hoverinfo: "skip", marker: { color: [0], cmin: Number(inner[0]), cmax: Number(inner[last]), showscale: true,
        colorscale: [0, 0.25, 0.5, 0.75, 1].map((t) => [t, blend(theme.ramp, 0.35 + 0.65 * t)]), colorbar: colorbar(theme, narrow, { title: { text: "layer", font: { size: 12, color: theme.soft } }, tickformat: "d", nticks: Math.min(inner.length, 6) }) } });
    }
    return { data, layout: layout(theme, { height: narrow ? 340 : 380, margin: { t: narrow ? 62 : 28 },
      annotations: [note(theme, safe(options.metric + (options.log ? ", log scale" : "")), { x: 0, xanchor: "left", y: 1, yanchor: "bottom", yshift: narrow ? 42 : 6, font: { size: 13, color: theme.soft } })],
      xaxis: axis(theme, { title: options.axis, showline: true, exponentformat: "SI", nticks: narrow ? 5 : 9 }), yaxis: axis(theme, { type: options.log ? "log" : "linear", exponentformat: "power", nticks: 6 }) }) };
  }

  return { number, column, colourOf, result, difference, relation, front, curves, strips, profiles, matrix, seriesHeat, seriesLines };
})();
