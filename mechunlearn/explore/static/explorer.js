// The explorer of circuits: draws the view that Python gives, and tells Python what was clicked. Text is set as text only.

const COLOURS = { up: "0, 114, 178", down: "213, 94, 0" }; // as in the plots

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) element.append(child);
  return element;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return (value > 0 ? "+" : "") + Number(value).toPrecision(digits);
}

function percent(value) {
  return (100 * value).toFixed(2) + " %";
}

function shade(value, most) {
  if (!value || !most) return "transparent";
  const strength = Math.min(1, Math.abs(value) / most);
  return `rgba(${value > 0 ? COLOURS.up : COLOURS.down}, ${(0.08 + 0.82 * strength).toFixed(3)})`;
}

function choice(label, options, chosen, changed, disabled = false) {
  const select = make(
    "select",
    { "aria-label": label, disabled: disabled ? "" : null, onchange: () => changed(select.value) },
    options.map(([value, text]) => make("option", { value, selected: value === chosen ? "" : null }, text)),
  );
  return make("label", {}, make("span", {}, label), select);
}

function factText(fact, extra = null) {
  return [fact.before, make("b", {}, fact.subject), fact.after, make("span", { class: "soft" }, " → ", fact.answer), extra];
}

function heatMap(view, act) {
  const heat = view.heat;
  const most = Math.max(...heat.values.flat().map((value) => Math.abs(value ?? 0)), 1e-12);
  const head = make("tr", {}, make("th", {}, ""), heat.columns.map((name) => make("th", { scope: "col" }, String(name))));
  const rows = heat.rows.map((name, i) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      heat.values[i].map((value, j) => {
        const component = heat.cells[i][j];
        const shown = view.detail && view.detail.component === component;
        const selected = heat.selected[i][j];
        const label = `${component}, ${name}: ${number(value)}, ${Math.round(100 * selected)} % selected`;
        const mark = selected > 0 ? make("span", { class: "mark" }, selected < 1 ? "◐" : "●") : null;
        const button = make(
          "button",
          {
            class: "cell" + (shown ? " shown" : ""),
            style: `background-color: ${shade(value, most)}`,
            title: label,
            "aria-label": label,
            "data-component": component,
            onclick: () => act({ do: "show", component }),
          },
          mark,
        );
        return make("td", {}, button);
      }),
    ),
  );
  return make(
    "figure",
    { class: "heat" },
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, rows))),
    make(
      "figcaption",
      {},
      "layer → · ",
      make("span", { class: "key", style: `background: rgba(${COLOURS.down}, .8)` }, number(-most)),
      " 0 ",
      make("span", { class: "key", style: `background: rgba(${COLOURS.up}, .8)` }, number(most)),
      ` ${heat.what} · ● all, ◐ some of it in the mask`,
    ),
  );
}

function bars(pairs, unit) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-12);
  return make(
    "div",
    { class: "bars" },
    pairs.map(([name, value]) => [
      make("span", {}, name),
      make("span", { class: "bar" }, make("i", { style: `width: ${(100 * Math.abs(value)) / most}%; background: ${shade(value, most)}` })),
      make("span", { class: "number", title: unit }, number(value)),
    ]),
  );
}

function attention(found) {
  const head = make("tr", {}, make("th", {}, ""), found.tokens.map((token) => make("th", { class: "token" }, make("span", {}, token))));
  const rows = found.pattern.map((line, i) =>
    make(
      "tr",
      {},
      make("th", { class: "token" }, found.tokens[i]),
      line.map((value, j) =>
        make("td", { style: `background: rgba(${COLOURS.up}, ${j > i ? 0 : value})`, title: `${found.tokens[i]} takes ${value} from ${found.tokens[j]}` }),
      ),
    ),
  );
  return make("div", { class: "scroll" }, make("table", { class: "attention" }, make("thead", {}, head), make("tbody", {}, rows)));
}

function activations(found) {
  const most = Math.max(...found.values.map(Math.abs), 1e-12);
  return make(
    "p",
    { class: "tokens" },
    found.tokens.map((token, i) => make("span", { style: `background: ${shade(found.values[i], most)}`, title: number(found.values[i]) }, token)),
  );
}

function detailOf(view, act) {
  const detail = view.detail;
  if (!detail) {
    return make("section", { class: "detail" }, make("p", { class: "soft" }, "Click a cell to see the component behind it."));
  }
  const all = detail.selected === detail.of;
  const parts = [
    make("h3", {}, detail.component, make("span", { class: "soft" }, " " + detail.what)),
    make(
      "p",
      {},
      make("button", { class: "toggle", onclick: () => act({ do: "toggle", component: detail.component }) }, all ? "Remove from the mask" : "Add to the mask"),
      make("span", { class: "soft" }, ` ${detail.selected} of ${detail.of} ${detail.of === 1 ? "unit" : "units"} in it`),
    ),
    make(
      "dl",
      {},
      make("dt", {}, `score (${view.method.replaceAll("_", " ")}${view["uses metric"] ? "" : "; has no metric"})`),
      make("dd", {}, detail.score ? number(detail.score.value) + (detail.score.rank ? `, rank ${detail.score.rank} of ${detail.score.of}` : "") : "not scored"),
      make("dt", {}, "effect"),
      make("dd", {}, `${number(detail.effect)} ${view.metric.replaceAll("_", " ")} with its corrupt activation (exact, ${detail.measured} ${detail.measured === 1 ? "fact" : "facts"})`),
      make("dt", {}, "direct effect"),
      make("dd", {}, detail.direct === null ? "writes nothing itself" : `${number(detail.direct)} logits, answer minus foil`),
    ),
    make("h4", {}, "Effect by token role"),
    bars(Object.entries(detail.roles), view.metric),
    make("h4", {}, "Facts it changes most"),
    make("ol", { class: "facts" }, detail.facts.map((fact) => make("li", {}, make("span", { class: "number" }, number(fact.effect, 2)), make("span", {}, factText(fact))))),
  ];
  if (detail.units) {
    parts.push(
      make("h4", {}, "Its units, largest score first"),
      make(
        "div",
        { class: "units" },
        detail.units.map((unit) =>
          make(
            "button",
            { class: unit.selected ? "in" : "", "data-component": unit.component, onclick: () => act({ do: "show", component: unit.component }) },
            unit.component.split(".").pop() + " ",
            make("span", { class: "number" }, number(unit.score)),
          ),
        ),
      ),
    );
  }
  if (detail.attention) parts.push(make("h4", {}, "Attention on the first of these facts (row: from, column: to)"), attention(detail.attention));
  if (detail.words) {
    parts.push(make("h4", {}, "Words it raises and lowers when it is active (direct path)"));
    for (const [change, words] of Object.entries(detail.words)) {
      parts.push(make("p", { class: "words" }, make("span", { class: "soft" }, change), words.map(([word, value]) => make("code", { class: change, title: number(value) }, word))));
    }
    parts.push(make("h4", {}, "Where it is active in the first of these facts"), activations(detail.activations));
  }
  return make("section", { class: "detail" }, parts);
}

function maskOf(view, act, kept) {
  const mask = view.mask;
  const share = make("input", { type: "number", min: 0, max: 100, step: "any", value: kept.share, "aria-label": "percent of the weights", oninput: () => (kept.share = share.value) });
  const path = make("input", { type: "text", value: kept.path, "aria-label": "file name of the mask", oninput: () => (kept.path = path.value) });
  const [value, low, high] = mask.faithfulness ?? [];
  const facts = mask.measured === 1 ? "one fact" : `${mask.measured} facts`;
  const interval = mask.measured === 1 ? "" : ` [${low?.toFixed(3)}, ${high?.toFixed(3)}]`;
  const faithful = mask.faithfulness ? `${value.toFixed(3)}${interval} of the logit difference, ${facts}` : "not measured";
  return make(
    "section",
    { class: "mask" },
    make("h3", {}, "Mask"),
    make("p", { class: "total" }, make("b", {}, String(mask.units)), ` units, `, make("b", {}, percent(mask.share)), " of the editable weights"),
    make("p", { class: "sites" }, Object.entries(mask.sites).map(([site, count]) => make("code", {}, `${site} ${count}`))),
    make("p", {}, make("button", { "data-do": "take", onclick: () => act({ do: "take", share: Number(share.value) / 100 }) }, "Take the largest"), share, " % of the weights"),
    make(
      "p",
      {},
      make("button", { "data-do": "above", onclick: () => act({ do: "take", above: 0 }) }, "Take all with a score"),
      make("button", { "data-do": "clear", onclick: () => act({ do: "clear" }) }, "Empty it"),
    ),
    make(
      "p",
      { title: "The mask's heads and neurons run alone, all others on the corrupt prompts: 1 is the whole model, 0 none of them" },
      make("button", { "data-do": "faithfulness", onclick: () => act({ do: "faithfulness" }) }, "Measure faithfulness"),
      make("span", { class: "faithful" }, " " + faithful),
    ),
    make("p", {}, make("button", { "data-do": "save", onclick: () => act({ do: "save", path: path.value }) }, "Save mask"), path),
  );
}

function render({ model, el }) {
  const root = make("div", { class: "mu-explorer" });
  const kept = { share: "5", path: "explored.mask.json" };
  const waiting = []; // what was asked and not answered yet: the first is being done
  const act = (message) => {
    if (message.do === "show" && waiting.length > 1 && waiting.at(-1).do === "show") waiting.pop(); // of components clicked in a hurry, the last
    waiting.push(message);
    if (waiting.length === 1) send();
  };
  const send = () => {
    root.classList.add("busy");
    root.setAttribute("aria-busy", "true");
    model.send(waiting[0]);
  };
  const draw = () => {
    const view = model.get("view");
    const scrolled = [...root.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    const facts = view.facts.map((fact, i) => [String(i), fact.before + fact.subject + fact.after]);
    root.classList.remove("busy");
    root.setAttribute("aria-busy", "false");
    root.replaceChildren(
      make(
        "div",
        { class: "controls" },
        choice("method", view.methods.map((name) => [name, name.replaceAll("_", " ")]), view.method, (method) => act({ do: "choose", method })),
        choice("metric", view.metrics.map((name) => [name, name.replaceAll("_", " ")]), view.metric, (metric) => act({ do: "choose", metric })),
        choice("map", Object.entries(view.maps), view.map, (map) => act({ do: "choose", map })),
        choice("fact", [["all", `all ${facts.length} facts`], ...facts], view.fact === null ? "all" : String(view.fact), (fact) =>
          act(fact === "all" ? { do: "choose", all_facts: true } : { do: "choose", fact: Number(fact) }),
        ),
      ),
      make("p", { class: "error", role: "alert" }, view.error),
      make("p", { class: "said", role: "status" }, view.said || view.note),
      make("div", { class: "panes" }, heatMap(view, act), detailOf(view, act), maskOf(view, act, kept)),
    );
    [...root.querySelectorAll(".scroll")].forEach((box, i) => (box.scrollLeft = scrolled[i] ?? 0));
    waiting.shift();
    if (waiting.length) send();
  };
  model.on("change:view", draw);
  draw();
  el.append(root);
}

export default { render };
