"use strict";
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

// Tables: a heading sorts by its column, numbers as numbers; a field keeps the rows that hold all its words.
for (const table of all("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numeric = !head.classList.contains("text");
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true })) * (down ? -1 : 1);
    }));
  }));
  const field = table.closest(".table").querySelector("input");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase();
      row.classList.toggle("out", !words.every(word => text.includes(word)));
    }
    count(table);
  });
  count(table);
}

function count(table) {
  const rows = [...table.tBodies[0].rows], shown = rows.filter(row => !row.matches(".out, .off")).length;
  table.closest(".table").querySelector("output").textContent =
    `${shown === rows.length ? "" : `${shown} of `}${rows.length} row${rows.length === 1 ? "" : "s"}`;
}

// Arms: a chip hides and shows its arm everywhere; what is pointed at stands out in every chart.
const chips = all(".chip[data-arm]");
function show(chip, on) {
  chip.setAttribute("aria-pressed", on);
  all(`main [data-arm="${chip.dataset.arm}"]`).forEach(element => element.classList.toggle("off", !on));
}
function recount() {
  all("table.sortable").forEach(count);
  const some = chips.some(chip => chip.getAttribute("aria-pressed") === "true");
  all(".chip.all").forEach(button => { button.textContent = some ? "hide all" : "show all"; });
}
chips.forEach(chip => chip.addEventListener("click", () => {
  show(chip, chip.getAttribute("aria-pressed") !== "true");
  recount();
}));
all(".chip.all").forEach(button => button.addEventListener("click", () => {
  const on = button.textContent === "show all";
  chips.forEach(chip => show(chip, on));
  recount();
}));

const tip = document.getElementById("tip");
function point(event) {
  const arm = event.target.closest?.("[data-arm]"), told = event.target.closest?.("[data-tip]");
  all(".lit").forEach(element => element.classList.remove("lit"));
  document.body.classList.toggle("hot", Boolean(arm?.matches("svg *, .chip")));
  if (arm) all(`svg [data-arm="${arm.dataset.arm}"]`).forEach(element => element.classList.add("lit"));
  tip.hidden = !told;
  if (!told) return;
  tip.textContent = told.dataset.tip;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
}
for (const name of ["pointermove", "pointerdown"]) document.addEventListener(name, point);
document.documentElement.addEventListener("pointerleave", point);

// Colors: as the system says, unless light or dark is chosen; kept where the browser lets a file keep anything.
const theme = document.getElementById("theme"), themes = ["auto", "light", "dark"];
function color(name) {
  theme.textContent = name;
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("crossft-theme", name); } catch { /* not kept */ }
}
theme.addEventListener("click", () => color(themes[(themes.indexOf(theme.textContent) + 1) % 3]));
try { color(themes.includes(localStorage.getItem("crossft-theme")) ? localStorage.getItem("crossft-theme") : "auto"); } catch { color("auto"); }
