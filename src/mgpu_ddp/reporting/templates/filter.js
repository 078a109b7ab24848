"use strict";
for (const box of document.querySelectorAll(".filter")) {
  const rows = [...document.querySelectorAll("#errors tbody tr")];
  const input = box.querySelector("input"), count = box.querySelector("output");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      shown += !row.hidden;
    });
    count.textContent = input.value.trim() ? `${shown} of ${rows.length}` : "";
  });
  box.hidden = false;
}
