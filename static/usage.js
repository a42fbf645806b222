// The page /usage: fetches /v1/usage with the key that the chat page keeps for this origin, or with one that is typed here, which is not kept.
"use strict";

{
  const form = document.querySelector("form"), alert = document.querySelector(".alert"), notice = document.querySelector(".notice");
  const table = document.querySelector("table"), [body, foot] = [document.querySelector("tbody"), document.querySelector("tfoot")];
  const AMOUNTS = ["requests", "prompt_tokens", "cached_tokens", "completion_tokens", "compute_s"];

  function keptKey() {
    try {
      return JSON.parse(localStorage.getItem("chat_server preferences"))?.keys?.[location.origin] ?? "";
    } catch (error) {
      return "";                    // storage is off or damaged
    }
  }

  function row(names, amounts) {
    const made = document.createElement("tr");
    for (const text of names) made.append(Object.assign(document.createElement("td"), {textContent: text}));
    for (const name of AMOUNTS) {
      made.append(Object.assign(document.createElement("td"), {textContent: amounts[name].toLocaleString(), className: "number"}));
    }
    return made;
  }

  function show(usage) {
    body.replaceChildren(...usage.data.map(one => row([one.day, one.key || "(no key)", one.model, one.background ? "yes" : ""], one)));
    foot.replaceChildren(row(["All", "", "", ""], usage.total));
    table.hidden = !usage.data.length;
    const {budget} = usage;
    notice.textContent = [
      usage.data.length ? "" : "Nothing was used on these days.", usage.key === null ? "All keys." : "", `Kept ${usage.kept}.`,
      usage.cut ? "There is more; choose fewer days." : "",
      budget ? `Today ${budget.used_today.toLocaleString()} of ${budget.tokens_per_day.toLocaleString()} tokens.` : ""].filter(Boolean).join(" ");
  }

  async function load() {
    const key = form.elements.key.value || keptKey(), asked = new URLSearchParams();
    for (const name of ["from", "to"]) if (form.elements[name].value) asked.set(name, form.elements[name].value);
    alert.hidden = true;
    try {
      const response = await fetch(`../v1/usage?${asked}`, {headers: key ? {Authorization: `Bearer ${key}`} : {}});
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error?.message ?? response.statusText);
      show(answer);
    } catch (error) {
      table.hidden = true;
      notice.textContent = "";
      alert.textContent = error.message;
      alert.hidden = false;
    }
  }

  form.addEventListener("submit", event => {
    event.preventDefault();
    load();
  });
  load();
}
