// Copies a command; without this script the commands are there to be selected.
for (const command of document.querySelectorAll(".command")) {
  if (!navigator.clipboard) break;
  const text = command.querySelector("pre").textContent.trim();
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", `Copy: ${command.dataset.purpose}`);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not copied";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  command.append(button);
}
