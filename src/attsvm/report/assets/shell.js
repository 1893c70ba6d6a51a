// What every page has: the theme, and buttons that copy.
const theme = {
  button: byId('theme'),
  isDark: () => (document.documentElement.dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark',
  label() { this.button.textContent = this.isDark() ? 'Light theme' : 'Dark theme'; },
  toggle() {
    document.documentElement.dataset.theme = this.isDark() ? 'light' : 'dark';
    try { localStorage.setItem('attsvm-theme', document.documentElement.dataset.theme); } catch { /* storage is off: the choice lasts for this visit */ }
    this.label();
  },
  start() {
    try {
      const kept = localStorage.getItem('attsvm-theme');
      if (kept === 'dark' || kept === 'light') document.documentElement.dataset.theme = kept;
    } catch { /* storage is off */ }
    this.button.hidden = false;
    this.button.addEventListener('click', () => this.toggle());
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.label());
    this.label();
  },
};
theme.start();

for (const button of document.querySelectorAll('[data-copy]')) {
  button.hidden = false;
  button.addEventListener('click', async () => {
    await copy(byId(button.dataset.copy));
    button.textContent = 'Copied';
    announce('Copied.');
    setTimeout(() => { button.textContent = 'Copy'; }, 2000);
  });
}
