const tip = document.getElementById("tip");
const legend = document.querySelector(".legend");
const read = new WeakMap();
let marked = [];

const numbers = (runs) =>
  runs.split(" ").flatMap((run) => {
    const [first, last = first] = run.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  });

// A path draws every bar of one stage and kind whose needs are alike, each box from where the one before began.
const bars = (path) => {
  if (!read.has(path)) {
    const boxes = path.getAttribute("d").matchAll(/m(-?\d+) (-?\d+)h(\d+)v(\d+)/g);
    const microbatches = numbers(path.dataset.microbatches);
    let [x, y] = [0, 0];
    const bar = ([, right, down, width, height], index) => {
      x += Number(right);
      y += Number(down);
      return { path, microbatch: microbatches[index], x, y, width: Number(width), height: Number(height) };
    };
    read.set(path, Array.from(boxes, bar));
  }
  return read.get(path);
};

const nameOf = ({ path, microbatch }) => `${path.dataset.stage}${path.classList[0]}${microbatch}`;

const barAt = (path, clientX, clientY) => {
  const { x, y } = new DOMPoint(clientX, clientY).matrixTransform(path.getScreenCTM().inverse());
  return bars(path).find((bar) => bar.x <= x && x <= bar.x + bar.width && bar.y <= y && y <= bar.y + bar.height);
};

const needs = ({ path, microbatch }) =>
  Array.from(path.dataset.needs.matchAll(/(\d+)(\w)(-?\d+)/g), ([, stage, kind, distance]) => {
    const paths = path.closest("svg").querySelectorAll(`.${kind}[data-stage="${stage}"]`);
    return [...paths].flatMap(bars).find((bar) => bar.microbatch === microbatch + Number(distance));
  });

const hide = () => {
  tip.hidden = true;
  for (const outline of marked) outline.remove();
  marked = [];
};

const mark = ({ path, x, y, width, height }, name) => {
  const outline = path.cloneNode();
  outline.removeAttribute("data-stage");
  outline.setAttribute("class", name);
  outline.setAttribute("d", `M${x} ${y}h${width}v${height}h${-width}z`);
  path.parentNode.append(outline); // above the neighbours, which would cover half of it
  marked.push(outline);
};

const describe = (bar, needed) => {
  const { path, microbatch, x, width } = bar;
  const { unit, grain } = path.closest("section").dataset;
  const write = (grains) => `${Number((grains * grain).toPrecision(5))} ${unit}`.trim();
  return [
    `${nameOf(bar)}  ${legend.querySelector(`.${path.classList[0]} span`).textContent}`,
    `rank ${path.parentNode.dataset.rank}, stage ${path.dataset.stage}, microbatch ${microbatch}`,
    `${write(x)} to ${write(x + width)}, takes ${write(width)}`,
    ...("again" in path.dataset ? ["does the forward again first"] : []),
    needed.length ? `needs ${needed.map(nameOf).join(", ")}` : "needs only its input",
  ];
};

const show = (bar, x, y) => {
  hide();
  const needed = needs(bar);
  mark(bar, "here");
  for (const other of needed) mark(other, "needed");
  const [head, ...lines] = describe(bar, needed);
  tip.replaceChildren(document.createElement("b"), lines.join("\n"));
  tip.firstChild.textContent = head;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - tip.offsetHeight - 8))}px`;
};

document.addEventListener("pointermove", ({ target, clientX, clientY }) => {
  const path = target.closest("[data-stage]");
  const bar = path && barAt(path, clientX, clientY);
  bar ? show(bar, clientX, clientY) : hide();
});
document.addEventListener("scroll", hide, true);

// Where there would be too many labels for the page to carry, those in sight are written here.
const late = document.querySelectorAll(".labels:empty");

const rowLabels = (row, pixels, from, to) => {
  const paths = [...row.querySelectorAll("[data-stage]")];
  const several = new Set(paths.map((path) => path.dataset.stage)).size > 1;
  const top = row.transform.baseVal[0].matrix.f;
  return paths.flatMap(bars).filter((bar) => bar.x < to && from < bar.x + bar.width).map((bar) => {
    const fits = (label) => 7.3 * label.length + 6 < bar.width * pixels + 0.1; // as in chart.py
    const label = [...(several ? [nameOf(bar)] : []), `${bar.microbatch}`].find(fits);
    const x = (bar.x + bar.width / 2) * pixels;
    return label ? `<text x="${x}" y="${top + bar.y + bar.height / 2 + 4}">${label}</text>` : "";
  });
};

const writeLabels = () => {
  for (const labels of late) {
    const { left, top, bottom, width } = labels.getBoundingClientRect();
    const inSight = width && bottom > 0 && top < innerHeight;
    const picture = labels.previousElementSibling;
    const pixels = width / picture.viewBox.baseVal.width;
    const rows = inSight ? [...picture.querySelectorAll("[data-rank]")] : [];
    const written = rows.flatMap((row) => rowLabels(row, pixels, -left / pixels, (innerWidth - left) / pixels));
    labels.innerHTML = written.join("");
  }
};

let waiting = 0;
const writeSoon = () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(writeLabels);
};
document.addEventListener("scroll", writeSoon, true);
document.addEventListener("change", writeSoon);
addEventListener("resize", writeSoon);
writeSoon();

const charts = document.querySelectorAll(".scroll");
for (const chart of charts)
  chart.addEventListener("scroll", () => {
    for (const other of charts) other.scrollLeft = chart.scrollLeft;
  });
