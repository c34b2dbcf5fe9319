"""A blinded form for people: one self-contained page, by keyboard, that remembers and exports its answers."""

import hashlib
import html
import json
from pathlib import Path

from ..errors import InputError

_PAGE = """<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Which is better?</title><style>
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5c6670; --page: #f6f6f4; --card: #fff; --line: #d9dde2; --pick: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --page: #15181c; --card: #1d2228;
  --line: #343b44; --pick: #56b4e9; } }
* { box-sizing: border-box; } body { font: 17px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 64rem; padding: 1.5rem; }
header { display: flex; gap: 1rem; align-items: center; flex-wrap: wrap; } h1 { font-size: 1.2rem; margin: 0; flex: 1; }
progress { width: 100%; height: .5rem; margin: .8rem 0 1.2rem; accent-color: var(--pick); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: 1rem; } @media (max-width: 46rem) { .two {
  grid-template-columns: 1fr; } }
.two .card { border-width: 2px; } .picked, .card.picked { border-color: var(--pick); box-shadow: 0 0 0 1px var(--pick); }
#prompt { max-height: 45vh; overflow-y: auto; } h2 { font-size: .85rem; color: var(--soft);
  margin: 0 0 .4rem; text-transform: uppercase; letter-spacing: .05em; }
footer { position: sticky; bottom: 0; background: var(--page); border-top: 1px solid var(--line); padding: .8rem 3px .3rem;
  margin: 1rem -3px 0; }
nav { display: flex; gap: .6rem; flex-wrap: wrap; } button { font: inherit; padding: .5rem 1rem;
  border: 1px solid var(--line); border-radius: 6px; background: var(--card); color: var(--ink); cursor: pointer; }
button:focus-visible { outline: 2px solid var(--pick); } kbd { color: var(--soft); font-size: .85em; margin-left: .3rem; }
button.done { background: var(--pick); border-color: var(--pick); color: var(--page); }
p.note { color: var(--soft); font-size: .9rem; margin: .5rem 0; } input { font: inherit; padding: .3rem .5rem; width: 12rem;
  color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
</style></head><body><header><h1 id=question></h1><label>Your name <input id=person autocomplete=off></label></header>
<progress id=bar value=0 max=1></progress><section class=card><h2 id=thing></h2><div id=prompt></div></section>
<div class=two><section class=card id=cardA><h2>A</h2><div id=a></div></section>
<section class=card id=cardB><h2>B</h2><div id=b></div></section></div>
<footer><nav><button id=pickA>A is better<kbd>A</kbd></button><button id=pickB>B is better<kbd>B</kbd></button>
<button id=pickT>Equal<kbd>E</kbd></button><button id=back>Back<kbd>←</kbd></button><button id=next>Next<kbd>→</kbd></button>
<button id=export>Export answers</button></nav><p class=note id=status></p></footer>
<script id=data type="application/json">DATA</script><script>
"use strict";
const form = JSON.parse(document.getElementById("data").textContent), byId = (id) => document.getElementById(id);
const key = "dpoctl-" + form.form;
let state = { at: 0, answers: {}, person: "" };
try { state = Object.assign(state, JSON.parse(localStorage.getItem(key) || "{}")); } catch (e) { /* private mode */ }
const save = () => { try { localStorage.setItem(key, JSON.stringify(state)); } catch (e) { /* private mode */ } };
const done = () => Object.keys(state.answers).length;
function show() {
  const item = form.items[state.at], picked = state.answers[item.id];
  byId("question").textContent = form.question; byId("thing").textContent = form.thing;
  byId("prompt").textContent = item.prompt.trim(); byId("a").textContent = item.A.trim(); byId("b").textContent = item.B.trim();
  for (const [id, choice] of [["cardA", "A"], ["cardB", "B"], ["pickA", "A"], ["pickB", "B"], ["pickT", "tie"]])
    byId(id).classList.toggle("picked", picked === choice);
  byId("export").classList.toggle("done", done() === form.items.length);
  byId("bar").value = done() / form.items.length; byId("person").value = state.person;
  const said = picked ? ", answered " + (picked === "tie" ? "equal" : picked) : "";
  byId("status").textContent = "Comparison " + (state.at + 1) + " of " + form.items.length + said + ". " + done() +
    " answered; progress is kept in this browser." + (done() === form.items.length ? " All done: export your answers." : "");
  save();
}
function go(step) {
  state.at = Math.min(form.items.length - 1, Math.max(0, state.at + step)); show(); byId("prompt").scrollTop = 0; scrollTo(0, 0);
}
function pick(choice) { state.answers[form.items[state.at].id] = choice; go(1); }
function answers() { return JSON.stringify({ form: form.form, person: state.person || "anonymous", answers: state.answers }); }
byId("pickA").onclick = () => pick("A"); byId("pickB").onclick = () => pick("B"); byId("pickT").onclick = () => pick("tie");
byId("back").onclick = () => go(-1); byId("next").onclick = () => go(1);
byId("person").oninput = (e) => { state.person = e.target.value; save(); };
byId("export").onclick = () => {
  const link = document.createElement("a"), name = (state.person || "anonymous").replace(/[^\\w-]+/g, "_");
  link.href = URL.createObjectURL(new Blob([answers()], { type: "application/json" }));
  link.download = "answers-" + name + ".json"; link.click();
};
document.addEventListener("keydown", (e) => {
  if (e.target.tagName === "INPUT" || e.ctrlKey || e.metaKey || e.altKey) return;
  const act = { a: () => pick("A"), b: () => pick("B"), e: () => pick("tie"), arrowleft: () => go(-1), arrowright: () => go(1) };
  const run = act[e.key.toLowerCase()]; if (run) { e.preventDefault(); run(); }
});
show();
</script></body></html>
"""


def form_id(items: list[dict]) -> str:
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:16]


def page(items: list[dict], question: str, prompt_noun: str) -> str:
    """The page; `items` are {"id", "prompt", "A", "B"} in the order they are shown, with nothing that names a side."""
    data = json.dumps(
        {"form": form_id(items), "question": question, "thing": prompt_noun, "items": items}, ensure_ascii=False
    )
    # within a script element only "</" could end it, and "<!--" begin a comment
    return _PAGE.replace("<title>Which is better?", f"<title>{html.escape(question)}").replace(
        "DATA", data.replace("<", "\\u003c"), 1
    )


def read_answers(path: str, items: list[dict]) -> tuple[str, dict[str, str]]:
    """(person, item id -> `A`, `B` or `tie`) of an exported file. Raises InputError for another form's, or a broken one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        person, form, answers = str(data["person"]), data["form"], dict(data["answers"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: not answers of a form ({type(e).__name__})", "the form's Export button writes them"
        ) from None
    if form != form_id(items):
        raise InputError(
            f"{path}: answers of another form", "the candidates, --seed and --criterion must be the form's"
        )
    known = {item["id"] for item in items}
    bad = [key for key, value in answers.items() if key not in known or value not in ("A", "B", "tie")]
    if bad:
        raise InputError(f"{path}: answer {bad[0]}: expected A, B or tie to a comparison of the form")
    return person, answers
