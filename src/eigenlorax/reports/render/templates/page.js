// Sorting and filtering of the tables of adapters, and the switch of themes. Without this, the page is all there.
"use strict";
(() => {
  const root = document.documentElement;
  const names = { "": "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };
  const order = Object.keys(names);
  const button = document.createElement("button");
  button.type = "button";
  button.className = "theme";
  const set = (theme) => {
    root.dataset.theme = theme;
    button.textContent = names[theme];
  };
  button.addEventListener("click", () => set(order[(order.indexOf(root.dataset.theme) + 1) % order.length]));
  set("");
  document.querySelector("header").prepend(button);
})();
document.querySelectorAll("table.sorted").forEach((table) => {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);

  const value = (row, column) => {
    const cell = row.cells[column];
    const text = (cell.title || cell.textContent).trim().replace("−", "-").replace(/^>/, "");
    // a column of words is sorted as words, whatever they begin with
    return heads[column].classList.contains("t") || column === 0 ? text : parseFloat(text.replaceAll(",", ""));
  };
  const missing = (x) => x === "–" || Number.isNaN(x);
  const compared = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);

  const sort = (column) => {
    const head = heads[column];
    const words = column === 0 || head.classList.contains("t");
    const before = head.getAttribute("aria-sort");
    // numbers: the largest first
    const up = before ? before === "descending" : words;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = rows.map((row, place) => ({ row, place, key: value(row, column) }));
    keyed.sort((a, b) => {
      if (missing(a.key) || missing(b.key)) return missing(a.key) - missing(b.key) || a.place - b.place;
      return (up ? 1 : -1) * compared(a.key, b.key) || a.place - b.place;
    });
    body.append(...keyed.map((entry) => entry.row));
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(column));
    head.append(button);
  });

  const bar = document.createElement("div");
  bar.className = "filter";
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter by name";
  input.setAttribute("aria-label", "Filter the adapters by name");
  const shown = document.createElement("span");
  shown.setAttribute("aria-live", "polite");
  const names = rows.map((row) => row.cells[0].textContent.toLowerCase());
  const filter = () => {
    const wanted = input.value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row, place) => {
      row.hidden = !names[place].includes(wanted);
      count += row.hidden ? 0 : 1;
    });
    shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} adapters`;
  };
  input.addEventListener("input", filter);
  bar.append(input, shown);
  table.parentElement.before(bar);
  filter();
});
