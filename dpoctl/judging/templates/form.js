"use strict";
const byId = (id) => document.getElementById(id);
const form = JSON.parse(byId("data").textContent);
const key = "dpoctl-" + form.form + (form.share ? "-" + form.share : "");
const SHOWN = { A: "A", B: "B", tie: "equal", both_bad: "both bad" };

// localStorage is not available in private windows: the form then works without memory, and says so
let state = { at: 0, answers: {}, comments: {}, person: "" }, kept = true;
try { state = Object.assign(state, JSON.parse(localStorage.getItem(key) || "{}")); } catch (e) { kept = false; }
const save = () => { try { localStorage.setItem(key, JSON.stringify(state)); } catch (e) { kept = false; } };

const answered = () => Object.keys(state.answers).length;
const complete = () => answered() === form.items.length;
const person = () => state.person.trim() || (form.share ? "annotator-" + form.share : "anonymous");

function show() {
  const item = form.items[state.at], picked = state.answers[item.id];
  byId("prompt").textContent = item.prompt.trim();
  byId("a").textContent = item.A.trim();
  byId("b").textContent = item.B.trim();
  byId("comment").value = state.comments[item.id] || "";
  const marked = [["cardA", "A"], ["cardB", "B"], ["pickA", "A"], ["pickB", "B"], ["pickT", "tie"], ["pickX", "both_bad"]];
  for (const [id, choice] of marked) byId(id).classList.toggle("picked", picked === choice);
  byId("export").classList.toggle("done", complete());
  byId("bar").value = answered() / form.items.length;
  byId("person").value = state.person;
  const answer = picked ? ", answered " + SHOWN[picked] : "";
  byId("status").textContent = "Comparison " + (state.at + 1) + " of " + form.items.length + answer + ". " + answered() +
    " answered; " + (kept ? "progress is kept in this browser." : "this browser keeps nothing: export before you leave.") +
    (complete() ? " All done: export your answers." : "");
}

function go(step) {
  state.at = Math.min(form.items.length - 1, Math.max(0, state.at + step));
  save();
  show();
  byId("prompt").scrollTop = 0;
  scrollTo(0, 0);
}

function pick(choice) {
  const last = state.at === form.items.length - 1;
  state.answers[form.items[state.at].id] = choice;
  go(1);
  if (complete() && last) byId("exports").scrollIntoView({ block: "end" });
}

function comment(text) {
  const id = form.items[state.at].id;
  if (text.trim()) state.comments[id] = text;
  else delete state.comments[id];
  save();
}

// --- exports

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: type }));
  link.download = name.replace(/[^\w.-]+/g, "_");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function exportAnswers() {
  const about = { form: form.form, person: person(), share: form.share, of: form.items.length };
  const answers = JSON.stringify(Object.assign(about, { answers: state.answers, comments: state.comments }));
  download("answers-" + person() + ".json", "application/json", answers);
}

function exportCsv() {
  const quoted = (cell) => '"' + String(cell).replaceAll('"', '""') + '"';
  const rows = [["person", "id", "prompt_id", "prompt", "A", "B", "choice", "comment"]];
  for (const i of form.items) {
    const choice = state.answers[i.id] || "", said = state.comments[i.id] || "";
    if (choice || said) rows.push([person(), i.id, i.prompt_id, i.prompt, i.A, i.B, choice, said]);
  }
  const lines = rows.map((row) => row.map(quoted).join(",") + "\r\n");
  download("answers-" + person() + ".csv", "text/csv", "\ufeff" + lines.join("")); // the mark tells spreadsheets UTF-8
}

function exportPreferences() {
  const rows = form.items.filter((i) => state.answers[i.id] === "A" || state.answers[i.id] === "B").map((i) => {
    const [chosen, rejected] = state.answers[i.id] === "A" ? [i.A, i.B] : [i.B, i.A];
    return JSON.stringify({ prompt_id: i.prompt_id, prompt: i.prompt, chosen: chosen, rejected: rejected }) + "\n";
  });
  download("preferences-" + person() + ".jsonl", "application/x-ndjson", rows.join(""));
}

// --- controls

const picks = { pickA: "A", pickB: "B", pickT: "tie", pickX: "both_bad" };
for (const [id, choice] of Object.entries(picks)) byId(id).onclick = () => pick(choice);
byId("back").onclick = () => go(-1);
byId("next").onclick = () => go(1);
byId("export").onclick = exportAnswers;
byId("csv").onclick = exportCsv;
byId("preferences").onclick = exportPreferences;
byId("person").oninput = (e) => { state.person = e.target.value; save(); };
byId("comment").oninput = (e) => comment(e.target.value);

const keys = {
  a: () => pick("A"), b: () => pick("B"), e: () => pick("tie"), x: () => pick("both_bad"),
  c: () => byId("comment").focus(), arrowleft: () => go(-1), arrowright: () => go(1),
};
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape") e.target.blur();
  if (["INPUT", "TEXTAREA"].includes(e.target.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
  const action = keys[e.key.toLowerCase()];
  if (action) { e.preventDefault(); action(); }
});
// what is answered in another tab with this form, so that neither writes over the other's answers
addEventListener("storage", (e) => {
  if (e.key === key && e.newValue) { Object.assign(state, JSON.parse(e.newValue)); show(); }
});
show();
