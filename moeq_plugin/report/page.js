// Draws every chart in the reader's colours, and again when scheme, width or medium change.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const PRINTED_WIDTH = 680; // pixels of an A4 page between its margins

  // "$ink" becomes what the style sheet says --ink is now
  const color = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const colored = (value) => {
    if (typeof value === "string") return value[0] === "$" ? color(value.slice(1)) || value : value;
    if (Array.isArray(value)) return value.map(colored);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, colored(v)]));
  };

  const axis = { gridcolor: "$line", linecolor: "$line", tickcolor: "$line", automargin: true,
    title: { standoff: 10 }, fixedrange: true };
  const merged = (ours, theirs) => ({ ...ours, ...theirs,
    title: { ...ours.title, ...(theirs || {}).title } });

  const layoutOf = (chart, width) => colored({
    ...chart.layout,
    width,
    autosize: width === undefined,
    xaxis: merged(axis, chart.layout.xaxis),
    yaxis: merged(axis, chart.layout.yaxis),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "$ink" },
    hoverlabel: { bgcolor: "$card", bordercolor: "$line", font: { color: "$ink" }, align: "left" },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: false, // a finger on a chart scrolls the page
  });

  const drawOne = async (chart, width) => {
    const div = document.getElementById("chart-" + chart.name);
    await Plotly.react(div, colored(chart.data), layoutOf(chart, width),
      { displayModeBar: false, responsive: true });
    const legend = div.querySelector(".legend");
    if (!legend) return;
    // as many rows as the width leads to, beyond the chart's own height
    const rows = Math.ceil(legend.getBBox().height);
    await Plotly.relayout(div, { "margin.t": rows + 12, height: chart.layout.height + rows });
  };

  const draw = async (width) => {
    const all = Object.values(charts);
    await Promise.all(all.map((chart) => drawOne(chart, width)));
    document.documentElement.dataset.drawn = all.length;
  };

  draw();
  const onScreen = () => { delete document.documentElement.dataset.medium; return draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onScreen);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.medium = "print";
    draw(PRINTED_WIDTH);
  });
  addEventListener("afterprint", onScreen);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(onScreen, 150); });
})();
