
for (const board of document.querySelectorAll(".pg-board")) {
  const select = board.querySelector("select");
  if (!select) continue;
  const buttons = [...board.querySelectorAll(".pg-filters button")];
  const items = [...board.querySelectorAll("[data-verdicts]")];
  const order = ["10", "01", "00", "11"];
  const number = (item) => Number(item.dataset.number ?? item.id.split("-")[1]);
  const kindOf = (item) => select.value.split(",").map((run) => item.dataset.verdicts[run]).join("");
  const place = (item) => (order.indexOf(kindOf(item)) + order.length + 1) % (order.length + 1);
  const chosen = () => buttons.find((button) => button.ariaPressed === "true").dataset.kind;

  const filter = () => {
    const kind = chosen();
    for (const item of items) item.hidden = kind !== "" && kindOf(item) !== kind;
  };
  const compare = () => {
    const { first, second } = select.selectedOptions[0].dataset;
    const names = {
      10: `${first} right and ${second} wrong`, "01": `${first} wrong and ${second} right`,
      "00": "both wrong", 11: "both right", "": "all",
    };
    const rows = items.filter((item) => item.tagName === "TR");
    for (const button of buttons) {
      const kind = button.dataset.kind;
      const count = rows.filter((row) => kind === "" || kindOf(row) === kind).length;
      button.firstChild.data = `${names[kind]} `;
      button.querySelector("span").textContent = count;
    }
    const shown = new Set([...select.value.split(","), board.dataset.full]);
    for (const cell of board.querySelectorAll("[data-run]")) cell.hidden = !shown.has(cell.dataset.run);
    for (const list of board.querySelectorAll(".pg-list")) {
      list.append(...[...list.children].sort((a, b) => place(a) - place(b) || number(a) - number(b)));
    }
    filter();
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.ariaPressed = String(other === button);
      filter();
    });
  }
  select.addEventListener("change", compare);
  compare();
}

for (const input of document.querySelectorAll("[name=view]")) {
  input.addEventListener("change", () => document.body.classList.toggle("rj-scores", input.value === "scores"));
}

const tip = document.getElementById("pg-tip");
const tell = (event) => {
  const map = event.target.closest?.(".rj-map");
  tip.hidden = !map;
  if (!map) return;
  const [rows, columns] = map.dataset.grid.split("x").map(Number);
  const box = map.getBoundingClientRect();
  const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
  const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
  const token = row * columns + column;
  let text = `token ${token} (row ${row}, column ${column}): ${STATES[map.dataset.states[token]]}`;
  if (map.dataset.scores !== undefined) {
    const scores = map.dataset.scores.split(",");
    const own = scores[token];
    const candidates = scores.filter((score) => score !== "");
    const rank = 1 + candidates.filter((score) => Number(score) > Number(own)).length;
    text += own === "" ? ", no candidate" : `, score ${own}, rank ${rank} of ${candidates.length}`;
  }
  tip.textContent = text;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
};
document.addEventListener("pointermove", tell);
document.addEventListener("pointerdown", tell);
