// What the theme's scripts make without a name, or so that no key reaches it.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  const name = () => {
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) {
      const caption = box.closest("article").querySelector("h1")?.firstChild?.textContent ?? "";
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", `Table: ${caption}`);
    }
    document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((bar, k) => bar.setAttribute("aria-label", `Copy block ${k + 1}`));
  };
  name();
  new MutationObserver(name).observe(document.querySelector("article"), { childList: true, subtree: true });
});
