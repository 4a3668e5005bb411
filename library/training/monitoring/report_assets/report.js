"use strict";
// Draws the charts of the report page. Their data is the JSON in the page's element "chart-data", a chart for each figure.
(() => {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // At most five significant digits: 0.1234, 2e-5.
  const format = (value) => {
    const size = Math.abs(value);
    const rounded = Number(value.toPrecision(5));
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return rounded.toExponential().replace("e+", "e");
    return rounded.toLocaleString("en", { maximumFractionDigits: 10 });
  };
  const formatStep = (step) => step.toLocaleString("en");

  // The legend shows each line's value under the cursor or, without a cursor, its last value. A line that has no value at
  // this step (validation, for example) shows the nearest one and its step.
  const legendValue = (plot, value, series, index) => {
    if (index == null) {
      const last = plot.data[series].findLast((one) => one != null);
      return last == null ? "" : format(last);
    }
    if (value == null) return "";
    const isElsewhere = index !== plot.cursor.idx;
    return format(value) + (isElsewhere ? ` (step ${formatStep(plot.data[0][index])})` : "");
  };

  const legendStep = (plot, step) => formatStep(step ?? plot.data[0].at(-1));

  const seriesOf = (line) => {
    const known = line.values.filter((value) => value != null).length;
    const isSparse = known < line.values.length / 2; // its value in the legend often has a step
    return {
      label: line.name,
      class: isSparse ? "sparse" : line.look || undefined,
      stroke: () => color(`--c${line.color}`),
      width: line.look === "faint" ? 1 : 2,
      alpha: line.look !== "faint" ? 1 : known > 600 ? 0.35 : 0.6,
      dash: line.look === "dashed" ? [6, 5] : undefined,
      spanGaps: true,
      points: { show: known === 1 || (line.look === "dots" && known <= 200), size: 7, fill: () => color(`--c${line.color}`) },
      value: legendValue,
    };
  };

  const stepRange = (plot, first, last) => (first === last ? [first - 1, last + 1] : [first, last]);

  // The complete run is shown in the chart's own range, which leaves out single spikes. After zooming in, the range is
  // that of the visible values.
  const valueRange = (chart) => (plot, low, high) => {
    const [start, end] = plot.series[0].idxs;
    const isZoomed = start > 0 || end < chart.steps.length - 1;
    if (!isZoomed || low == null) return chart.range;
    if (chart.is_log) return [Math.max(low, chart.range[0]) / 1.5, Math.max(high, chart.range[0]) * 1.5];
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  };

  const gridLines = (chart) => (plot, values) => {
    if (!chart.is_log) return values;
    return values.map((value) => (value.toExponential().startsWith("1e") ? value : null)); // powers of 10
  };

  const axis = (values, others) => ({
    font: "12px system-ui, sans-serif",
    stroke: () => color("--soft"),
    grid: { stroke: () => color("--rule"), width: 1 },
    ticks: { show: false },
    values: (plot, ticks) => ticks.map((tick) => (tick == null ? "" : values(tick))),
    ...others,
  });

  const wholeNumbers = [];
  for (let power = 1; power <= 1e15; power *= 10) wholeNumbers.push(power, 2 * power, 5 * power);

  const draw = (chart, place) => {
    const size = () => ({ width: place.clientWidth, height: place.closest(".tall") ? 360 : 250 });
    const plot = new uPlot(
      {
        ...size(),
        padding: [8, null, null, null],
        series: [{ label: "step", value: legendStep }, ...chart.lines.map(seriesOf)],
        scales: {
          x: { time: false, range: stepRange },
          y: { distr: chart.is_log ? 3 : 1, range: valueRange(chart) },
        },
        axes: [
          axis(formatStep, {
            incrs: wholeNumbers,
            space: 70,
            size: 28,
            label: "step",
            labelSize: 18,
            labelFont: "italic 12px system-ui, sans-serif",
          }),
          axis(format, {
            space: 32,
            size: 64,
            grid: { stroke: () => color("--rule"), width: 1, filter: gridLines(chart) },
          }),
        ],
        // The cursor is in all charts at the same step.
        cursor: { y: false, hover: { skip: [null] }, sync: { key: "steps", setSeries: false } },
        legend: {
          markers: {
            stroke: (_, series) => `var(--c${chart.lines[series - 1].color})`,
            dash: (_, series) => (chart.lines[series - 1].look === "dashed" ? "dashed" : "solid"),
          },
        },
      },
      [chart.steps, ...chart.lines.map((line) => line.values)],
      place,
    );
    new ResizeObserver(() => plot.setSize(size())).observe(place);
    return plot;
  };

  const places = document.querySelectorAll(".plot");
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const plots = charts.map((chart, index) => draw(chart, places[index]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.redraw()));
})();
