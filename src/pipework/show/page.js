const tip = document.getElementById("tip");
const legend = document.querySelector(".legend");
let marked = [];

const hide = () => {
  tip.hidden = true;
  for (const outline of marked) outline.remove();
  marked = [];
};

const mark = (bar, name) => {
  const outline = bar.cloneNode();
  outline.removeAttribute("data-action");
  outline.setAttribute("class", name);
  bar.parentNode.append(outline); // above the neighbours, which would cover half of it
  marked.push(outline);
};

const describe = (bar) => {
  const { unit, perSecond } = bar.closest("section").dataset;
  const { action, time, needs } = bar.dataset;
  const write = (moment) => `${Number((moment * perSecond).toPrecision(5))} ${unit}`.trim();
  const [, stage, kind, microbatch] = action.match(/(\d+)(\w)(\d+)/);
  const [start, end] = time.split(" ").map(Number);
  return [
    `${action}  ${legend.querySelector(`.${kind} span`).textContent}`,
    `rank ${bar.parentNode.dataset.rank}, stage ${stage}, microbatch ${microbatch}`,
    `${write(start)} to ${write(end)}, takes ${write(end - start)}`,
    needs ? `needs ${needs.replaceAll(" ", ", ")}` : "needs only its input",
  ];
};

const show = (bar, x, y) => {
  hide();
  mark(bar, "here");
  for (const needed of bar.dataset.needs.split(" "))
    bar.closest("svg").querySelectorAll(`[data-action="${needed}"]`).forEach((other) => mark(other, "needed"));
  const [head, ...lines] = describe(bar);
  tip.replaceChildren(document.createElement("b"), lines.join("\n"));
  tip.firstChild.textContent = head;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - tip.offsetHeight - 8))}px`;
};

document.addEventListener("pointermove", (event) => {
  const bar = event.target.closest("[data-action]");
  bar ? show(bar, event.clientX, event.clientY) : hide();
});
document.addEventListener("scroll", hide, true);

const charts = document.querySelectorAll(".scroll");
for (const chart of charts)
  chart.addEventListener("scroll", () => {
    for (const other of charts) other.scrollLeft = chart.scrollLeft;
  });
