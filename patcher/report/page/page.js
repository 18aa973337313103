"use strict";
// Sorting keeps the order of equal rows, both ways; a number that is absent stays last.
function keyOf(row, column, kind) {
  const cell = row.cells[column];
  if (kind === "text") return cell.textContent;
  return cell.dataset.key === "" ? null : Number(cell.dataset.key);
}

function compare(a, b, kind, sign) {
  if (kind === "text") return sign * a.localeCompare(b, "en", { numeric: true });
  if (a === null || b === null) return (a === null ? 1 : 0) - (b === null ? 1 : 0);
  return sign * (a - b);
}

function sortBy(table, header) {
  const column = header.cellIndex;
  const kind = header.dataset.kind;
  const way = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const sign = way === "ascending" ? 1 : -1;
  const body = table.tBodies[0];
  const keyed = Array.from(body.rows, (row) => [keyOf(row, column, kind), row]);
  keyed.sort((a, b) => compare(a[0], b[0], kind, sign));
  body.append(...keyed.map((entry) => entry[1]));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", way);
  document.getElementById("sorted").textContent = `sorted by ${header.textContent}, ${way}`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortBy(table, header));
  }
}
