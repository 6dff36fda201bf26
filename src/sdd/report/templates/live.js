(() => {
  const EVERY = 4000;
  let tag = null;
  const banner = document.createElement("p");
  banner.className = "live";
  banner.setAttribute("role", "status");
  const key = (details) => details.querySelector("summary")?.textContent;
  const show = (fresh) => {
    const open = new Set([...document.querySelectorAll("details[open]")].map(key));
    const sideways = [...document.querySelectorAll(".scroll")].map((part) => part.scrollLeft);
    const [x, y] = [scrollX, scrollY];
    for (const script of fresh.querySelectorAll("script")) script.remove();
    document.title = fresh.title;
    document.head.querySelector("style")?.replaceChildren(fresh.head.querySelector("style")?.textContent ?? "");
    document.body.replaceChildren(banner, ...fresh.body.childNodes);
    for (const details of document.querySelectorAll("details")) details.open ||= open.has(key(details));
    document.querySelectorAll(".scroll").forEach((part, index) => { part.scrollLeft = sideways[index] ?? 0; });
    scrollTo(x, y);
  };
  const look = async () => {
    try {
      const answer = await fetch("/", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        show(new DOMParser().parseFromString(await answer.text(), "text/html"));
        banner.textContent = `Live. Last update: ${new Date().toLocaleTimeString()}.`;
        banner.dataset.pages = 1 + Number(banner.dataset.pages ?? 0);
      }
    } catch {
      banner.textContent = "No answer: the run has ended, or the connection is lost. This is the last state received.";
    }
    setTimeout(look, EVERY);
  };
  look();
})();
