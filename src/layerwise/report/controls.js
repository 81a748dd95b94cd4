"use strict";
// What the sections of the page share: theme, drawing, selectors, legends, tables of numbers.

const Controls = (() => {
  const at = (id) => document.getElementById(id);
  const draws = [];

  // --- theme -------------------------------------------------------------------------------------------------------------

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const list = (name) => colour(name).split(",").map((c) => c.trim());
    return {
      ...Object.fromEntries(["ink", "soft", "rule", "axis", "paper", "sheet", "shade"].map((name) => [name, colour(`--${name}`)])),
      ramp: list("--ramp"), split: list("--split"), variants: [0, 1, 2, 3, 4, 5, 6, 7].map((i) => colour(`--c${i}`)),
    };
  }

  function show(name) {
    document.documentElement.dataset.theme = name;
    at("theme").textContent = name === "dark" ? "Light" : "Dark";
    at("theme").setAttribute("aria-label", `Switch to the ${name === "dark" ? "light" : "dark"} page`);
    at("theme").hidden = false;
    drawAll();
  }

  function chooseTheme() {
    const current = () => document.documentElement.dataset.theme;
    let chosen = null;
    try { chosen = localStorage.getItem("layerwise-theme"); } catch (error) { /* nothing is kept; the choice lasts as long as the page */ }
    at("theme").addEventListener("click", () => {
      chosen = current() === "dark" ? "light" : "dark";
      try { localStorage.setItem("layerwise-theme", chosen); } catch (error) { /* as above */ }
      show(chosen);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => { if (!chosen) show(event.matches ? "dark" : "light"); });
    let before = null;
    addEventListener("beforeprint", () => { before = current(); if (before === "dark") show("light"); });
    addEventListener("afterprint", () => { if (before === "dark") show("dark"); });
    show(current() || "light");
  }

  // --- drawing -----------------------------------------------------------------------------------------------------------

  function drawAll() { for (const draw of draws) draw(); }

  // A plot in the place `id`; `figure` makes it for a theme and a width, `words` says what it shows.
  function drawing(id, figure, words) {
    const place = at(id);
    place.setAttribute("role", "img");
    const save = document.createElement("button");
    Object.assign(save, { type: "button", className: "save", textContent: "Save as SVG" });
    save.addEventListener("click", () => Plotly.downloadImage(place, { format: "svg", filename: id, width: place.clientWidth, height: place.clientHeight }));
    place.after(save);
    const draw = () => {
      place.hidden = false; // so that it has a width
      const made = figure(theme(), place.clientWidth);
      place.setAttribute("aria-label", words());
      place.hidden = !made;
      save.hidden = !made;
      save.setAttribute("aria-label", `Save as SVG: ${words()}`);
      if (made) Plotly.react(place, made.data, made.layout, { displayModeBar: false, responsive: false, doubleClick: "reset" });
    };
    draws.push(draw);
    return draw;
  }

  // Fill a select; with one option there is nothing to choose and it is hidden. Keeps what was chosen where it can.
  function fill(id, options, wanted) {
    const select = at(id);
    const values = options.map((option) => (typeof option === "string" ? { value: option, text: option } : option));
    const keep = values.some((o) => o.value === select.value) ? select.value : wanted;
    select.replaceChildren(...values.map(({ value, text }) => new Option(text, value)));
    if (keep !== undefined && values.some((o) => o.value === keep)) select.value = keep;
    select.closest(".control").hidden = values.length < 2;
  }

  // Names and colours of variants: buttons that switch a variant on and off, or plain labels.
  function legend(id, entries, toggle) {
    at(id).replaceChildren(...entries.map((variant) => {
      const item = document.createElement(toggle ? "button" : "span");
      const swatch = document.createElement("i");
      swatch.className = `swatch c${variant.colour % 8}`;
      item.append(swatch, variant.name);
      if (toggle) {
        item.type = "button";
        item.setAttribute("aria-pressed", "true");
        item.addEventListener("click", () => {
          const on = item.getAttribute("aria-pressed") !== "true";
          item.setAttribute("aria-pressed", String(on));
          toggle(variant.name, on);
        });
      }
      return item;
    }));
    at(id).hidden = entries.length < 2;
  }

  // A table under `place`; columns of numbers are set to the right.
  function numbers(place, columns, rows) {
    const table = document.createElement("table");
    const numeric = columns.map((_, k) => rows.some((row) => typeof row[k] === "number") && rows.every((row) => row[k] === null || k === 0 || typeof row[k] === "number"));
    const format = columns.map((_, k) => Plots.column(rows.map((row) => row[k])));
    const line = (cells, head) => {
      const row = document.createElement("tr");
      cells.forEach((text, k) => {
        const cell = document.createElement(head || k === 0 ? "th" : "td");
        if (head || k === 0) cell.scope = head ? "col" : "row";
        if (numeric[k]) cell.className = "n";
        cell.textContent = text;
        row.append(cell);
      });
      return row;
    };
    table.createTHead().append(line(columns, true));
    table.createTBody().append(...rows.map((row) => line(row.map((value, k) => format[k](value)), false)));
    place.replaceChildren(table);
  }

  return { at, drawing, fill, legend, numbers, chooseTheme, drawAll };
})();
