
"use strict";
// Everything can be read without this: it adds the values under the pointer, the search, and folds opened for printing.
for (const figure of document.querySelectorAll("figure.chart")) {
  const lines = JSON.parse(figure.dataset.lines), svg = figure.querySelector("svg");
  const bubble = document.createElement("div");
  bubble.className = "bubble";
  bubble.hidden = true;
  figure.append(bubble);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 12);
  cursor.setAttribute("y2", 194);
  const leave = () => { bubble.hidden = true; cursor.remove(); };
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const found = lines.filter((line) => line[2].length).map((line) => [line[0], nearest(line[2], x)]);
    if (!found.length) return;
    const at = nearest(found.map((each) => each[1]), x);
    cursor.setAttribute("x1", at[0]);
    cursor.setAttribute("x2", at[0]);
    svg.append(cursor);
    bubble.textContent = found.map(([name, point]) => `${name}  ${point[3]}  (step ${point[2]})`).join("\n");
    bubble.hidden = false;
    const left = event.clientX - outer.left + 14, most = outer.width - bubble.offsetWidth - 4;
    bubble.style.left = `${Math.max(4, left > most ? event.clientX - outer.left - bubble.offsetWidth - 14 : left)}px`;
    bubble.style.top = `${event.clientY - outer.top + 14}px`;
  });
  svg.addEventListener("pointerleave", leave);
}
const search = document.getElementById("search");
if (search) {
  search.hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const prompt of document.querySelectorAll("details.prompt")) {
      const text = prompt.textContent.toLowerCase();
      prompt.hidden = !words.every((word) => text.includes(word));
    }
  });
}
addEventListener("beforeprint", () => { for (const each of document.querySelectorAll("details")) each.open = true; });
