"use strict";
// The page: every section fills its controls from the data inside the page, draws, and draws again when something is chosen.

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { at, drawing, fill, legend, numbers } = Controls;
  const variants = new Map(data.variants.map((v) => [v.name, v]));
  const MEAN = "mean";

  const unique = (values) => [...new Set(values)];
  const inOrder = (values, order) => order.filter((v) => values.includes(v));
  const average = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const seedOptions = (seeds) => [...(seeds.length > 1 ? [{ value: MEAN, text: "mean of seeds" }] : []), ...seeds.map((s) => ({ value: `seed ${s}`, text: s || "–" }))];
  const isSeed = (chosen, seed) => chosen === MEAN || chosen === `seed ${seed}`;

  // --- result ------------------------------------------------------------------------------------------------------------

  function results() {
    const metrics = Object.keys(data.values);
    fill("result-metric", metrics, metrics[0]);
    const draw = drawing("result-plot", (colours, width) => {
      const metric = at("result-metric").value;
      const claimed = metric === data.claimed;
      const rows = data.variants.filter((v) => Object.hasOwn(data.values[metric], v.name)).map((v) => {
        const points = Object.entries(data.values[metric][v.name]).map(([seed, value]) => ({ seed, value }));
        const summary = (claimed && data.summary[v.name]) || {};
        return { name: v.name, colour: Plots.colourOf(colours, v), points, mean: summary.mean ?? average(points.map((p) => p.value)), ci: summary.ci95 };
      });
      return Plots.result(colours, rows, metric + (claimed ? ` (${data.direction} is better)` : ""), width);
    }, () => `${at("result-metric").value} of every seed and its mean, by variant`);
    at("result-metric").addEventListener("change", draw);
    if (data.difference && at("difference-plot")) {
      const method = variants.get(data.difference.method) || { colour: 0 };
      drawing("difference-plot", (colours, width) => Plots.difference(colours, data.difference, Plots.colourOf(colours, method), width),
        () => `Difference ${data.difference.method} minus ${data.difference.baseline}: ${Plots.number(data.difference.mean)}`);
    }
  }

  function relations() {
    data.relations.forEach((relation, i) => {
      const points = relation.points.map((p) => ({ ...p, variant: variants.get(p.variant) })).filter((p) => p.variant);
      drawing(`relation-plot-${i}`, (colours, width) => Plots.relation(colours, relation, points, width), () => `${relation.y} against ${relation.x}`);
    });
    const seen = new Set(data.relations.flatMap((r) => r.points.map((p) => p.variant)));
    legend("relation-legend", data.variants.filter((v) => seen.has(v.name)));
  }

  function sizes() {
    const points = data.front.points.map((p) => ({ ...p, variant: variants.get(p.variant) }));
    drawing("front-plot", (colours, width) => Plots.front(colours, { ...data.front, points }, width), () => "Added loss against size, by method");
    legend("front-legend", data.variants);
  }

  // --- training curves ---------------------------------------------------------------------------------------------------

  const PER_LAYER = /^(.*)\/(-?\d+)$/;
  const ALONG = [{ value: "step", text: "steps" }, { value: "tokens", text: "tokens" }, { value: "seconds", text: "seconds" }];

  // Exponential average, divided by the weight that has come together so far, so that the start is not pulled to zero.
  function smoothed(values, strength) {
    if (!strength) return values;
    let sum = 0, weight = 0;
    return values.map((v) => { sum = strength * sum + (1 - strength) * v; weight = strength * weight + (1 - strength); return sum / weight; });
  }

  function curveLines(metric, stages, along, strength, hidden) {
    const blocks = data.curves.filter((b) => metric in b.values && stages.includes(b.stage) && b[along].every((x) => x !== null));
    const offsets = {};
    let start = 0;
    for (const stage of stages) {
      const ends = blocks.filter((b) => b.stage === stage).map((b) => b[along][b[along].length - 1]);
      if (ends.length) { offsets[stage] = start; start += Math.max(...ends); }
    }
    const thin = [], bold = [];
    for (const variant of data.variants.filter((v) => !hidden.has(v.name)).reverse()) { // the first variant lies on top
      const mean = { variant, seed: null, bold: true, x: [], y: [] };
      const seeds = {};
      for (const stage of stages) {
        const own = blocks.filter((b) => b.variant === variant.name && b.stage === stage);
        const at = new Map();
        for (const block of own) {
          const y = smoothed(block.values[metric], strength);
          const line = (seeds[block.seed] ||= { variant, seed: block.seed, bold: false, x: [], y: [] });
          if (line.x.length) { line.x.push(null); line.y.push(null); }
          block.step.forEach((step, i) => {
            const x = block[along][i] + offsets[stage];
            line.x.push(x);
            line.y.push(y[i]);
            if (!at.has(step)) at.set(step, []);
            at.get(step).push([x, y[i]]);
          });
        }
        const whole = [...at.keys()].sort((a, b) => a - b).filter((step) => at.get(step).length === own.length);
        if (whole.length && mean.x.length) { mean.x.push(null); mean.y.push(null); }
        for (const step of whole) {
          mean.x.push(average(at.get(step).map((p) => p[0])));
          mean.y.push(average(at.get(step).map((p) => p[1])));
        }
      }
      if (Object.keys(seeds).length > 1) thin.push(...Object.values(seeds));
      if (mean.x.length) bold.push(mean);
    }
    const marks = Object.keys(offsets).length > 1 ? Object.entries(offsets).map(([text, x]) => ({ text, x })) : [];
    return { lines: [...thin, ...bold], marks };
  }

  function trainingCurves() {
    const hidden = new Set();
    const scalars = unique(data.curves.flatMap((b) => Object.keys(b.values))).filter((key) => !PER_LAYER.test(key));
    const first = ["loss", "val_loss"].filter((key) => scalars.includes(key));
    fill("curve-metric", unique([...first, ...scalars.sort()]));
    const stages = () => inOrder(unique(data.curves.filter((b) => at("curve-metric").value in b.values).map((b) => b.stage)), data.stages);
    const refill = () => {
      const found = stages();
      fill("curve-stage", [...(found.length > 1 ? [{ value: "", text: "all, one after another" }] : []), ...found.map((s) => ({ value: `stage ${s}`, text: s }))]);
      fill("curve-axis", ALONG.filter((a) => data.curves.some((b) => at("curve-metric").value in b.values && b[a.value].some((x) => x !== null))));
    };
    refill();
    const draw = drawing("curve-plot", (colours, width) => {
      const [metric, along] = [at("curve-metric").value, at("curve-axis").value];
      const chosen = stages().filter((s) => at("curve-stage").value === "" || at("curve-stage").value === `stage ${s}`);
      const strength = Number(at("curve-smooth").value);
      at("curve-smooth-value").textContent = strength.toFixed(2);
      const { lines, marks } = curveLines(metric, chosen, along, strength, hidden);
      const fine = matchMedia("(pointer: fine)").matches;
      return Plots.curves(colours, lines, marks, { metric, log: at("curve-log").checked, axis: ALONG.find((a) => a.value === along).text, width, fine });
    }, () => `${at("curve-metric").value} during training, by variant`);
    legend("curve-legend", data.variants.filter((v) => data.curves.some((b) => b.variant === v.name)), (name, on) => {
      if (on) hidden.delete(name); else hidden.add(name);
      draw();
    });
    at("curve-metric").addEventListener("change", () => { refill(); draw(); });
    for (const id of ["curve-stage", "curve-axis", "curve-log"]) at(id).addEventListener("change", draw);
    at("curve-smooth").addEventListener("input", draw);
  }

  // --- tables and matrices of stages -------------------------------------------------------------------------------------

  // Selectors for things that come from a stage of a variant and a seed: which one, of whom, of which seed.
  function chooser(ids, found, draw) {
    const key = (thing) => JSON.stringify([thing.stage, thing.title]);
    const several = unique(found.map((t) => t.stage)).length > 1;
    fill(ids[0], unique(found.map(key)).map((value) => { const [stage, title] = JSON.parse(value); return { value, text: several ? `${title} · ${stage}` : title }; }));
    const same = () => found.filter((t) => key(t) === at(ids[0]).value);
    const refill = () => {
      fill(ids[1], inOrder(unique(same().map((t) => t.variant)), data.variants.map((v) => v.name)));
      fill(ids[2], seedOptions(unique(same().filter((t) => t.variant === at(ids[1]).value).map((t) => t.seed))));
    };
    const named = () => { // with one table there is no selector that says its name
      at(`${ids[0]}-name`).textContent = at(ids[0]).selectedOptions[0].text;
      at(`${ids[0]}-name`).hidden = at(ids[0]).options.length > 1;
    };
    refill();
    named();
    for (const id of ids) at(id).addEventListener("change", () => { refill(); draw(); });
    return { same, chosen: () => same().filter((t) => t.variant === at(ids[1]).value && isSeed(at(ids[2]).value, t.seed)) };
  }

  // Numeric columns of the given tables by layer, averaged over the tables (seeds) that have the layer.
  function byLayer(tables) {
    const layers = unique(tables.flatMap((t) => t.rows.map((row) => String(row[0]))));
    const columns = tables[0].columns.slice(1).map((name, k) => ({
      name,
      values: layers.map((layer) => {
        const found = tables.map((t) => t.rows.find((row) => String(row[0]) === layer)?.[k + 1]).filter((v) => typeof v === "number");
        return found.length ? average(found) : null;
      }),
    }));
    return { layers, columns: columns.filter((c) => c.values.some((v) => v !== null)) };
  }

  function layerTables() {
    const found = data.tables.filter((t) => t.layers);
    const draws = [];
    const choice = chooser(["layer-table", "layer-variant", "layer-seed"], found, () => draws.forEach((d) => d()));
    const comparable = unique(found.map((t) => t.variant)).length > 1;
    fill("layer-view", [{ value: "strips", text: "one variant, as colours" }, { value: "profiles", text: comparable ? "all variants, as lines" : "as lines" }]);
    draws.push(drawing("layer-plot", (colours, width) => {
      const lines = at("layer-view").value === "profiles";
      const of = choice.chosen();
      numbers(at("layer-numbers"), of[0].columns, byLayer(of).layers.map((layer, i) => [/^\d+$/.test(layer) ? Number(layer) : layer, ...wholeColumns(of).map((c) => c[i])]));
      at("layer-variant").closest(".control").hidden = lines || at("layer-variant").options.length < 2;
      at("layer-seed").closest(".control").hidden = lines || at("layer-seed").options.length < 2;
      at("layer-caption").textContent = lines
        ? `${data.seeds.length > 1 ? "Mean over seeds by variant. " : ""}Layer 0 stands next to the input.`
        : "Every row is coloured over its own range, given at its right end; darker is more on a light page, lighter on a dark one. Layer 0 stands next to the input.";
      if (!lines) {
        legend("layer-legend", []);
        const table = byLayer(of);
        return table.columns.length ? Plots.strips(colours, table, width) : null;
      }
      const entries = data.variants.map((variant) => ({ variant, tables: choice.same().filter((t) => t.variant === variant.name) })).filter((e) => e.tables.length);
      legend("layer-legend", entries.map((e) => e.variant));
      const shown = entries.map((e) => ({ variant: e.variant, ...byLayer(e.tables) }));
      const order = byLayer(choice.same()).layers;
      const columns = unique(shown.flatMap((e) => e.columns.map((c) => c.name)));
      return columns.length ? Plots.profiles(colours, { columns, variants: shown, order }, width) : null;
    }, () => `${JSON.parse(at("layer-table").value)[1]}, by layer`));
    at("layer-view").addEventListener("change", () => draws.forEach((d) => d()));
  }

  // All columns, also those that are words, which a mean over seeds cannot show.
  function wholeColumns(tables) {
    const { layers } = byLayer(tables);
    return tables[0].columns.slice(1).map((_, k) => layers.map((layer) => {
      const cells = tables.map((t) => t.rows.find((row) => String(row[0]) === layer)?.[k + 1] ?? null);
      if (cells.length === 1) return cells[0];
      const found = cells.filter((v) => typeof v === "number");
      return found.length ? average(found) : null;
    }));
  }

  function otherTables() {
    const draw = () => {
      const table = choice.chosen()[0];
      numbers(at("other-numbers"), table.columns, table.rows);
    };
    const choice = chooser(["other-table", "other-variant", "other-seed"], data.tables.filter((t) => !t.layers), () => { withoutMean(); draw(); });
    const withoutMean = () => { for (const option of [...at("other-seed").options]) if (option.value === MEAN) option.remove(); };
    withoutMean();
    draw();
  }

  function matrices() {
    const draws = [];
    const choice = chooser(["matrix-title", "matrix-variant", "matrix-seed"], data.matrices, () => draws.forEach((d) => d()));
    draws.push(drawing("matrix-plot", (colours, width) => {
      const of = choice.chosen();
      const alike = of.filter((m) => m.values.length === of[0].values.length && m.x.length === of[0].x.length);
      const values = of[0].values.map((row, i) => row.map((_, j) => { const v = alike.map((m) => m.values[i][j]); return v.every((x) => x !== null) ? average(v) : null; }));
      return Plots.matrix(colours, { ...of[0], values }, width);
    }, () => JSON.parse(at("matrix-title").value)[1]));
  }

  // --- layers during training --------------------------------------------------------------------------------------------

  function layerSeries() {
    const place = (key) => key.match(PER_LAYER);
    const blocks = data.curves.flatMap((b) => Object.keys(b.values).filter(place).map((key) => ({ block: b, key, name: place(key)[1], layer: Number(place(key)[2]) })));
    const label = (layer, depth) => (layer === -1 ? "embedding" : layer === depth ? "head" : String(layer));
    const some = (...ids) => blocks.filter((s) => ids.every((id) => ({ "series-key": s.name, "series-stage": s.block.stage, "series-variant": s.block.variant })[id] === at(id).value));
    const refill = () => {
      fill("series-key", unique(blocks.map((s) => s.name)).sort());
      fill("series-stage", inOrder(unique(some("series-key").map((s) => s.block.stage)), data.stages));
      fill("series-variant", inOrder(unique(some("series-key", "series-stage").map((s) => s.block.variant)), data.variants.map((v) => v.name)));
      fill("series-seed", seedOptions(unique(some("series-key", "series-stage", "series-variant").map((s) => s.block.seed))));
    };
    refill();
    fill("series-view", [{ value: "heat", text: "layer by step, as colours" }, { value: "lines", text: "one line a layer" }]);
    const draw = drawing("series-plot", (colours, width) => {
      const chosen = some("series-key", "series-stage", "series-variant").filter((s) => isSeed(at("series-seed").value, s.block.seed));
      const seeds = unique(chosen.map((s) => s.block.seed));
      const layers = unique(chosen.map((s) => s.layer)).sort((a, b) => a - b);
      const cells = new Map();
      for (const s of chosen) s.block.step.forEach((step, i) => {
        const key = `${s.layer} ${step}`;
        if (!cells.has(key)) cells.set(key, []);
        cells.get(key).push(s.block.values[s.key][i]);
      });
      const steps = unique(chosen.flatMap((s) => s.block.step)).sort((a, b) => a - b).filter((step) => layers.some((l) => cells.get(`${l} ${step}`)?.length === seeds.length));
      const values = layers.map((l) => steps.map((step) => { const found = cells.get(`${l} ${step}`); return found && found.length === seeds.length ? average(found) : null; }));
      const options = { metric: at("series-key").value, axis: "step", log: at("series-log").checked, width };
      const series = { labels: layers.map((l) => label(l, chosen[0].block.depth)), x: steps, values };
      const heat = at("series-view").value === "heat";
      at("series-caption").textContent = heat ? "Time runs to the right, depth upwards." : "The deeper the layer, the stronger the colour; what lies before and after the layers is grey and broken.";
      return steps.length ? (heat ? Plots.seriesHeat : Plots.seriesLines)(colours, series, options) : null;
    }, () => `${at("series-key").value} of every layer during training`);
    for (const id of ["series-key", "series-stage", "series-variant", "series-seed", "series-view", "series-log"]) at(id).addEventListener("change", () => { refill(); draw(); });
  }

  // --- the rest ----------------------------------------------------------------------------------------------------------

  function contents() {
    const sections = [...document.querySelectorAll("main > section[id]")];
    at("contents").replaceChildren(...sections.map((section) => {
      const link = document.createElement("a");
      link.href = `#${section.id}`;
      link.textContent = section.querySelector("h2").textContent;
      return link;
    }));
    at("contents").hidden = sections.length < 3;
  }

  if (at("front-plot")) sizes();
  if (at("result-plot")) results();
  if (at("relation-legend")) relations();
  if (at("curve-plot")) trainingCurves();
  if (at("layer-plot")) layerTables();
  if (at("matrix-plot")) matrices();
  if (at("series-plot")) layerSeries();
  if (at("other-numbers")) otherTables();
  contents();
  Controls.chooseTheme();
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(Controls.drawAll, 120);
  });
})();
