"use strict";
// Sorts the table by the column whose heading is pressed: up first, down the second time.
const table = document.getElementById("jobs");
const body = table.tBodies[0];
const headings = [...table.tHead.rows[0].cells];

const keyOf = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.key ?? cell.textContent;
};
const compare = (one, other) => {
  if (one === "" || other === "") return (one === "") - (other === ""); // empty cells come last
  const numbers = [Number(one), Number(other)];
  if (numbers.every((number) => !Number.isNaN(number))) return numbers[0] - numbers[1];
  return one.localeCompare(other, undefined, { numeric: true });
};

headings.forEach((heading, column) => {
  heading.firstElementChild.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const each of headings) each.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
    rows.sort(([one], [other]) =>
      one === "" || other === "" ? compare(one, other) : (down ? -1 : 1) * compare(one, other),
    );
    body.append(...rows.map(([, row]) => row));
  });
});
