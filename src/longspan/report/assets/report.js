"use strict";
(() => {
  const { looks, figures } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const pressed = new Set();
  const lookOf = new Map(looks.flatMap((look) => look.members.map((label) => [label, look])));
  const FONT = 12;

  // Colours live in the style sheet alone; the browser says what light-dark() came to.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const paint = (look) => colour(!look || look.colour < 0 ? "ink" : `c${look.colour}`);

  const plain = document.createElement("canvas").getContext("2d");
  const widthOf = (text) => {
    plain.font = `${FONT}px ${getComputedStyle(document.body).fontFamily}`;
    return plain.measureText(text).width;
  };
  const escaped = (text) =>
    text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const isOut = (label) => pressed.size > 0 && !pressed.has(lookOf.get(label));
  const isNamed = (figure, label) =>
    pressed.size > 0 ? !isOut(label) : figure.named.includes(label);

  function axis(from, ink, rule) {
    return {
      type: from.type,
      range: from.range,
      fixedrange: true,
      ...(from.tickvals && { tickmode: "array", tickvals: from.tickvals, ticktext: from.ticktext }),
      tickfont: { color: ink, size: FONT },
      gridcolor: rule,
      zeroline: false,
      linecolor: rule,
      tickangle: 0,
      automargin: false,
    };
  }

  // Where a value lies between the ends of its axis, 0 to 1.
  const along = (from, value) => {
    const at = from.type === "log" ? Math.log10(value) : value;
    return (at - from.range[0]) / (from.range[1] - from.range[0]);
  };

  const note = (text, x, y, xanchor, yanchor, look, bold) => ({
    text: bold ? `<b>${escaped(text)}</b>` : escaped(text),
    xref: "paper", yref: "paper", x, y, xanchor, yanchor,
    showarrow: false, borderpad: 0,
    font: { color: paint(look), size: FONT },
  });

  // Names at the ends of lines, moved apart where they would overlap.
  function endLabels(figure, area) {
    const named = figure.series.filter((s) => isNamed(figure, s.of)).map((s) => ({
      label: s.of,
      y: along(figure.y, s.y.at(-1)) * area.height,
    }));
    named.sort((a, b) => a.y - b.y);
    const gap = FONT + 2;
    const room = Math.max(1, Math.floor(area.height / gap));
    const shown = named.slice(0, room);
    shown.forEach((l, i) => { if (i) l.y = Math.max(l.y, shown[i - 1].y + gap); });
    for (let i = shown.length - 1, top = area.height; i >= 0; i -= 1, top -= gap) {
      shown[i].y = Math.min(shown[i].y, top);
      top = shown[i].y;
    }
    return shown.map((l) =>
      note(l.label, 1 + 8 / area.width, l.y / area.height, "left", "middle", lookOf.get(l.label), l.label === figure.chosen));
  }

  // Names beside points, on the side where they cover least.
  function pointLabels(figure, area) {
    const points = figure.series.map((s) => ({
      label: s.of,
      x: along(figure.x, s.x[0]) * area.width,
      y: along(figure.y, s.y[0]) * area.height,
    }));
    const taken = points.map((p) => [p.x - 7, p.y - 7, p.x + 7, p.y + 7]);
    const { x: fx, y: fy, shape } = figure.frontier;
    fx.slice(1).forEach((_, i) => {
      const [x0, x1] = [fx[i], fx[i + 1]].map((v) => along(figure.x, v) * area.width);
      const [y0, y1] = [fy[i], fy[i + 1]].map((v) => along(figure.y, v) * area.height);
      const [level, upright] = shape === "hv" ? [y0, x1] : [y1, x0];
      taken.push([x0, level - 1, x1, level + 1], [upright - 1, Math.min(y0, y1), upright + 1, Math.max(y0, y1)]);
    });
    const overlap = (a, b) =>
      Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
      Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
    // The chosen and the baseline are named first and always; the others where there is room.
    const rank = (p) => (p.label === figure.chosen ? 0 : lookOf.get(p.label)?.colour < 0 ? 1 : 2);
    const named = points.filter((p) => isNamed(figure, p.label)).sort((a, b) => rank(a) - rank(b));
    return named.flatMap((p) => {
      const w = widthOf(p.label) * (p.label === figure.chosen ? 1.1 : 1);
      const h = FONT;
      const sides = [10, 20].flatMap((d) => [
        [p.x + d, p.y - h / 2], [p.x - d - w, p.y - h / 2],
        [p.x - w / 2, p.y + d], [p.x - w / 2, p.y - d - h],
        [p.x + 0.7 * d, p.y + 0.6 * d], [p.x + 0.7 * d, p.y - 0.6 * d - h],
        [p.x - 0.7 * d - w, p.y + 0.6 * d], [p.x - 0.7 * d - w, p.y - 0.6 * d - h],
      ]).map(([x, y]) => [x, y, x + w, y + h]);
      const cost = (box) =>
        taken.reduce((sum, other) => sum + overlap(box, other), 0) +
        1e4 * (box[0] < 0 || box[1] < 0 || box[2] > area.width || box[3] > area.height);
      const box = sides.reduce((best, side) => (cost(side) < cost(best) ? side : best));
      if (rank(p) === 2 && cost(box) > 60) return [];
      taken.push(box);
      return [{ ...note(p.label, box[0] / area.width, (box[1] + h / 2) / area.height, "left", "middle", lookOf.get(p.label), p.label === figure.chosen), bgcolor: colour("paper") }];
    });
  }

  function traces(figure) {
    const ink = colour("ink");
    const many = lookOf.size > 12;
    const last = (s) => (s.of === figure.chosen ? 3 : lookOf.get(s.of)?.colour < 0 ? 2 : Number(isNamed(figure, s.of)));
    const drawn = [...figure.series].sort((a, b) => last(a) - last(b)).map((s) => {
      const look = lookOf.get(s.of);
      const chosen = s.of === figure.chosen;
      const strong = chosen || look?.colour < 0 || (pressed.size > 0 && !isOut(s.of));
      const own = paint(look);
      return {
        type: "scatter",
        name: escaped(s.of),
        x: s.x, y: s.y, text: s.text,
        hovertemplate: s.after ? `%{text}<br>${escaped(s.after)}<extra></extra>` : "%{text}<extra></extra>",
        showlegend: false,
        // Among many, those without a name step back; they answer to the pointer and to the key.
        opacity: isOut(s.of) ? 0.12 : many && !isNamed(figure, s.of) ? 0.4 : 1,
        mode: figure.kind === "lines" ? "lines+markers" : "markers",
        line: { color: own, width: strong ? 2.6 : many ? 1.2 : 1.8, dash: look?.dash },
        marker: {
          color: own,
          symbol: look?.symbol,
          size: figure.kind === "points" ? (chosen ? 14 : 10) : strong ? 7 : many ? 4 : 6,
          line: { color: ink, width: figure.kind === "points" && chosen ? 2 : 0 },
        },
        ...(s.error && Math.max(...s.error) > 0 && {
          error_y: { type: "data", symmetric: false, array: [s.error[0]], arrayminus: [s.error[1]], color: own, thickness: 1.2, width: 3 },
        }),
      };
    });
    if (figure.frontier) {
      drawn.unshift({
        type: "scatter", mode: "lines", x: figure.frontier.x, y: figure.frontier.y,
        line: { color: colour("muted"), width: 1.2, dash: "dot", shape: figure.frontier.shape },
        hoverinfo: "skip", showlegend: false,
      });
    }
    return drawn;
  }

  function draw(figure) {
    const node = document.getElementById(`plot-${figure.id}`);
    const width = node.clientWidth;
    const height = node.clientHeight;
    const narrow = width < 440;
    const lines = figure.kind === "lines";
    const longest = Math.max(0, ...figure.series.filter((s) => isNamed(figure, s.of)).map((s) => widthOf(s.of) * 1.08));
    const right = lines && !narrow ? Math.min(longest + 16, width * 0.32) : 14;
    const ticks = figure.y.ticktext ?? ["0.00"];
    const left = Math.max(...ticks.map(widthOf)) + 10;
    const margin = { l: left, r: right, t: 30, b: 46 };
    const area = { width: width - margin.l - margin.r, height: height - margin.t - margin.b };
    const [ink, rule, muted] = ["ink", "rule", "muted"].map(colour);
    const x = axis(figure.x, muted, rule);
    if (x.tickvals) {
      let end = -Infinity;
      x.ticktext = x.ticktext.map((text, i) => {
        const at = along(figure.x, x.tickvals[i]) * area.width;
        const half = widthOf(text) / 2;
        if (at - half < end + 8) return "";
        end = at + half;
        return text;
      });
    }
    const close = narrow ? { ...figure, named: figure.named.filter((l) => l === figure.chosen || lookOf.get(l)?.colour < 0) } : figure;
    const notes = lines ? (narrow ? [] : endLabels(figure, area)) : pointLabels(close, area);
    if (!lines) {
      const high = figure.better === "high";
      notes.push({
        ...note(high ? "better ↘" : "better ↙", 1, 1, "right", "bottom"),
        yshift: 12, font: { color: muted, size: FONT },
      });
    }
    // Upright titles are read without turning the head, and cost no width on a phone.
    notes.push(
      { ...note(figure.y.title, 0, 1, "left", "bottom"), xshift: -left, yshift: 12, font: { color: muted, size: FONT } },
      { ...note(figure.x.title, 1, 0, "right", "top"), yshift: -24, font: { color: muted, size: FONT } },
    );
    const layout = {
      margin, width, height,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: FONT },
      hovermode: "closest",
      dragmode: false,
      hoverlabel: { bgcolor: colour("raised"), bordercolor: rule, font: { color: ink, size: FONT }, align: "left" },
      xaxis: x,
      yaxis: axis(figure.y, muted, rule),
      annotations: notes,
    };
    return Plotly.react(node, traces(figure), layout, { responsive: true, displayModeBar: false });
  }

  function picture(canvas) {
    const cells = Int8Array.from(atob(canvas.dataset.cells), (c) => c.charCodeAt(0));
    const channels = (name) => colour(name).match(/[\d.]+/g).slice(0, 3).map(Number);
    const [paper, positive, negative] = ["paper", "accent", "bad"].map(channels);
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    cells.forEach((cell, i) => {
      const towards = cell < 0 ? negative : positive;
      const share = Math.abs(cell) / 127;
      paper.forEach((from, c) => { image.data[4 * i + c] = from + share * (towards[c] - from); });
      image.data[4 * i + 3] = 255;
    });
    context.putImageData(image, 0, 0);
  }

  function drawAll() {
    figures.forEach(draw);
    document.querySelectorAll("canvas[data-cells]").forEach(picture);
  }

  document.querySelectorAll(".key button").forEach((button) => {
    button.addEventListener("click", () => {
      const look = looks[Number(button.dataset.look)];
      const on = !pressed.delete(look);
      if (on) pressed.add(look);
      button.setAttribute("aria-pressed", String(on));
      figures.forEach(draw);
    });
  });

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", (event) => {
      const other = { ascending: "descending", descending: "ascending" };
      const way = other[head.getAttribute("aria-sort")] ?? event.currentTarget.dataset.first;
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1;
      const valueOf = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [p, q] = [valueOf(a), valueOf(b)];
        if (p === undefined || q === undefined) return (p === undefined) - (q === undefined);
        return sign * (column === 0 ? p.localeCompare(q) : Number(p) - Number(q));
      });
      table.tBodies[0].append(...rows);
    }));
  });

  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const say = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    say();
    drawAll();
  });
  dark.addEventListener("change", () => { say(); drawAll(); });

  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    // A phone's address bar changes the height alone; nothing moves then.
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => figures.forEach(draw), 120);
  });

  say();
  drawAll();
})();
