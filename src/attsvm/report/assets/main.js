// Connects the parts. What works without a script is in the page already; what needs one is hidden until here.
const figures = data.charts.map((chart) => new ChartFigure(document.querySelector(`[data-chart="${chart.id}"]`), chart));

startList();

const stepButton = byId('step-scale');
stepButton.hidden = !data.charts.some((chart) => chart.x_scale === 'steps');
stepButton.addEventListener('click', () => {
  view.linearSteps = !view.linearSteps;
  stepButton.textContent = view.linearSteps ? 'Logarithmic steps' : 'Linear steps';
  for (const figure of figures) figure.redraw();
});

for (const button of document.querySelectorAll('[data-proof]')) {
  button.hidden = false;
  button.addEventListener('click', () => showProof(button.dataset.proof));
}
