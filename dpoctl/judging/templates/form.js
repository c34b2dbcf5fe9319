"use strict";
const byId = (id) => document.getElementById(id);
const form = JSON.parse(byId("data").textContent);
const key = "dpoctl-" + form.form;

// localStorage is not available in private windows: the form then works without memory
let state = { at: 0, answers: {}, person: "" };
try { state = Object.assign(state, JSON.parse(localStorage.getItem(key) || "{}")); } catch (e) { /* private window */ }
const save = () => { try { localStorage.setItem(key, JSON.stringify(state)); } catch (e) { /* private window */ } };

const answered = () => Object.keys(state.answers).length;
const complete = () => answered() === form.items.length;

function show() {
  const item = form.items[state.at], picked = state.answers[item.id];
  byId("prompt").textContent = item.prompt.trim();
  byId("a").textContent = item.A.trim();
  byId("b").textContent = item.B.trim();
  for (const [id, choice] of [["cardA", "A"], ["cardB", "B"], ["pickA", "A"], ["pickB", "B"], ["pickT", "tie"]])
    byId(id).classList.toggle("picked", picked === choice);
  byId("export").classList.toggle("done", complete());
  byId("bar").value = answered() / form.items.length;
  byId("person").value = state.person;
  const answer = picked ? ", answered " + (picked === "tie" ? "equal" : picked) : "";
  byId("status").textContent = "Comparison " + (state.at + 1) + " of " + form.items.length + answer + ". " + answered() +
    " answered; progress is kept in this browser." + (complete() ? " All done: export your answers." : "");
  save();
}

function go(step) {
  state.at = Math.min(form.items.length - 1, Math.max(0, state.at + step));
  show();
  byId("prompt").scrollTop = 0;
  scrollTo(0, 0);
}

function pick(choice) {
  state.answers[form.items[state.at].id] = choice;
  go(1);
}

function download() {
  const person = state.person || "anonymous";
  const answers = JSON.stringify({ form: form.form, person: person, answers: state.answers });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([answers], { type: "application/json" }));
  link.download = "answers-" + person.replace(/[^\w-]+/g, "_") + ".json";
  link.click();
}

byId("pickA").onclick = () => pick("A");
byId("pickB").onclick = () => pick("B");
byId("pickT").onclick = () => pick("tie");
byId("back").onclick = () => go(-1);
byId("next").onclick = () => go(1);
byId("export").onclick = download;
byId("person").oninput = (e) => { state.person = e.target.value; save(); };

const keys = { a: () => pick("A"), b: () => pick("B"), e: () => pick("tie"), arrowleft: () => go(-1), arrowright: () => go(1) };
document.addEventListener("keydown", (e) => {
  if (e.target.tagName === "INPUT" || e.ctrlKey || e.metaKey || e.altKey) return;
  const action = keys[e.key.toLowerCase()];
  if (action) { e.preventDefault(); action(); }
});
show();
