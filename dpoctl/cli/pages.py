"""What the help shows beside the options: every command's summary, the group it belongs to, and its examples."""

from dataclasses import dataclass

DATA, TRAINING, GENERATION, RESULTS, HELP = "Data", "Training", "Generation and evaluation", "Results", "Help"


@dataclass(frozen=True)
class Page:
    """`summary` is one sentence that fits on a line of 80 columns beside the command's name.

    An example is a command, after a comment where it needs one; its lines may end with a backslash.
    """

    group: str
    summary: str
    examples: tuple[str, ...]


PAGES = {
    "prepare": Page(
        DATA,
        "Prepare a task's data: texts, preferences and prompts.",
        (
            "dpoctl prepare toy --out toy",
            "dpoctl prepare imdb --tokenizer gpt2-large --out imdb",
            "dpoctl prepare hh --source hh.jsonl.gz --out hh",
        ),
    ),
    "preview": Page(
        DATA,
        "Show rows as a command reads them: tokens, lengths, counts.",
        (
            "dpoctl preview prefs.jsonl --model runs/sft",
            "# what sft trains on in a file of chats, with token ids\n"
            "dpoctl preview chats.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --for sft --ids",
            "# how many pairs a longer limit would keep whole; do prompts repeat?\n"
            "dpoctl preview prefs.jsonl --model runs/sft --max-length 1024 \\\n"
            "  --eval-prompts test.jsonl --rows 0",
        ),
    ),
    "make-prefs": Page(
        DATA,
        "Make preference pairs of samples: by scores, a judge or votes.",
        (
            "dpoctl make-prefs --model runs/sft --prompts imdb/prompts.train.jsonl \\\n"
            "  --scorer siebert/sentiment-roberta-large-english --out prefs.jsonl",
            "# samples that exist, scored by a reward model\n"
            "dpoctl make-prefs --samples samples.jsonl --scorer runs/rm --out prefs.jsonl",
            "# a model as judge; the key is read from OPENAI_API_KEY\n"
            "dpoctl make-prefs --samples samples.jsonl --judge openai \\\n"
            "  --judge-model gpt-5-mini --out prefs.jsonl",
            "# the votes of people, or of judges\n"
            "dpoctl make-prefs --judgements ada.jsonl --judgements ben.jsonl \\\n"
            "  --out prefs.jsonl",
            "# more in the documentation\ndpoctl docs preferences",
        ),
    ),
    "sft": Page(
        TRAINING,
        "Fine-tune a language model (SFT or Preferred-FT).",
        (
            "dpoctl sft --model gpt2-large --data imdb/sft.jsonl --out runs/sft",
            "# Preferred-FT: the chosen completions of preferences\n"
            "dpoctl sft --model runs/sft --data prefs.jsonl --field chosen \\\n"
            "  --out runs/preferred-ft",
        ),
    ),
    "train-dpo": Page(
        TRAINING,
        "Train a policy on preferences with DPO or a related loss.",
        (
            "dpoctl train-dpo --model runs/sft --data prefs.jsonl --beta 0.1 --out runs/dpo",
            "# estimate time and memory first\n"
            "dpoctl train-dpo --model runs/sft --data prefs.jsonl --out runs/dpo --dry-run",
            "# a LoRA adapter in place of all weights\n"
            "dpoctl train-dpo --model runs/sft --data prefs.jsonl --lora 16 --lr 1e-5 \\\n"
            "  --out runs/dpo-lora",
        ),
    ),
    "train-rm": Page(
        TRAINING,
        "Train a reward model on preferences (Bradley-Terry).",
        ("dpoctl train-rm --model runs/sft --data prefs.jsonl --out runs/rm",),
    ),
    "train-ppo": Page(
        TRAINING,
        "Train a policy with PPO and a KL penalty to a reference.",
        (
            "dpoctl train-ppo --model runs/sft --prompts imdb/prompts.train.jsonl \\\n"
            "  --reward runs/rm --target-kl 6 --out runs/ppo",
        ),
    ),
    "train-ilql": Page(
        TRAINING,
        "Learn values of tokens from scored completions (ILQL).",
        (
            "dpoctl train-ilql --model runs/sft --data scored.jsonl --out runs/ilql",
            "# from preferences: 1 for the chosen, -1 for the rejected completion\n"
            "dpoctl train-ilql --model runs/sft --data prefs.jsonl --rows preferences \\\n"
            "  --out runs/ilql",
            "# one model, a whole frontier\n"
            "dpoctl evaluate --model runs/ilql --ilql-beta 0,1,2,4 --ref runs/sft \\\n"
            "  --prompts test.jsonl --out eval.jsonl",
        ),
    ),
    "sample": Page(
        GENERATION,
        "Sample completions of prompts from a model.",
        (
            "dpoctl sample --model runs/dpo --prompts test.jsonl --out samples.jsonl",
            "# the best of 16 by a reward model\n"
            "dpoctl sample --model runs/sft --prompts test.jsonl --best-of 16 \\\n"
            "  --scorer runs/rm --out best.jsonl",
        ),
    ),
    "score": Page(
        GENERATION,
        "Score texts, or both sides of preferences, with a scorer.",
        (
            "dpoctl score --data samples.jsonl \\\n"
            "  --scorer siebert/sentiment-roberta-large-english --out scored.jsonl",
            "# the accuracy of a reward model by category\n"
            "dpoctl score --data reward-bench.jsonl --scorer runs/rm --by subset \\\n"
            "  --out by-subset.jsonl",
        ),
    ),
    "evaluate": Page(
        GENERATION,
        "Measure the reward, KL, length and fluency of models.",
        (
            "dpoctl evaluate --model runs/sft --model runs/dpo --ref runs/sft \\\n"
            "  --prompts imdb/prompts.test.jsonl --out eval.jsonl",
            "# samples that runs/dpo made earlier, with their KL\n"
            "dpoctl evaluate --completions samples.jsonl --model runs/dpo \\\n"
            "  --ref runs/sft --out eval-samples.jsonl",
        ),
    ),
    "judge": Page(
        GENERATION,
        "Compare completions in pairs: the win rate of A over B.",
        (
            "# a model decides; the key is read from OPENAI_API_KEY\n"
            "dpoctl judge dpo.jsonl sft.jsonl --model gpt-5-mini --out wins.jsonl",
            "# a local server\n"
            "dpoctl judge dpo.jsonl sft.jsonl --model NAME \\\n"
            "  --base-url http://localhost:8000/v1 --out wins.jsonl",
            "# in batches, at half the price of single calls\n"
            "dpoctl judge dpo.jsonl sft.jsonl --model gpt-5-mini --batch --out wins.jsonl",
            "# a classifier or reward model\n"
            "dpoctl judge dpo.jsonl sft.jsonl --backend scorer \\\n"
            "  --scorer runs/toy/classifier --criterion sentiment --out wins.jsonl",
            "# the samples of one file, compared with each other\n"
            "dpoctl judge --within samples.jsonl --model gpt-5-mini --out pairs.jsonl",
            "# is this judge any good? pairs whose better answer is known\n"
            "dpoctl judge --check prefs.jsonl --model gpt-5-mini --out check.jsonl",
            "# all pairs of several policies, and another one that joins them later\n"
            "dpoctl judge dpo.jsonl sft.jsonl base.jsonl --model gpt-5-mini \\\n  --out many.jsonl",
            "dpoctl judge --add ppo.jsonl --to many.jsonl --model gpt-5-mini \\\n  --out more.jsonl",
            "# people: write a form for the browser, then read what it exports\n"
            "dpoctl judge dpo.jsonl sft.jsonl --backend human --form form.html \\\n"
            "  --out wins.jsonl",
            "dpoctl judge dpo.jsonl sft.jsonl --backend human --answers ada.json \\\n  --out wins.jsonl",
            "# more in the documentation\ndpoctl docs judging",
        ),
    ),
    "merge": Page(
        RESULTS,
        "Join shards into one file, or an adapter and its base.",
        (
            "dpoctl merge samples.1.jsonl samples.2.jsonl --out samples.jsonl",
            "dpoctl merge runs/dpo-lora --base runs/sft --out runs/dpo",
        ),
    ),
    "report": Page(
        RESULTS,
        "Draw tables, figures and an HTML page from results.",
        ("dpoctl report runs/sft runs/dpo eval.jsonl wins.jsonl --out report",),
    ),
    "init": Page(
        HELP,
        "Copy a recipe into a new folder, or list the recipes.",
        ("dpoctl init", "dpoctl init toy && make -C toy", "dpoctl init own-preferences my-run"),
    ),
    "docs": Page(
        HELP,
        "Print a page of the documentation, or list the pages.",
        ("dpoctl docs", "dpoctl docs judging"),
    ),
    "env": Page(
        HELP,
        "Print versions, devices and caches for a bug report.",
        ("dpoctl env", "dpoctl env --json"),
    ),
}

DESCRIPTION = (
    "Run the experiments of Direct Preference Optimization (Rafailov et al., 2023): each stage is a command, and "
    "stages exchange files."
)
FIRST_STEPS = (
    "# the main experiment of the paper on a generated toy task, offline on a CPU\ndpoctl init toy && make -C toy",
    "# DPO on a file of rows with prompt, chosen and rejected\n"
    "dpoctl train-dpo --model MODEL --data preferences.jsonl --out runs/dpo",
    "# the documentation; the options of a command\ndpoctl docs\ndpoctl train-dpo --help",
    "# completion of commands and options in your shell (--show-completion prints it)\ndpoctl --install-completion",
)

# The notation of every SCORER option, explained once on a page
SCORER = (
    ("MODEL", "a sequence classifier, or a reward model of train-rm: directory or hub id"),
    ("MODEL@prob", "the same; what to return for the positive label: @prob, @logit or @log-odds"),
    ("implicit:POLICY,REFERENCE", "DPO's implicit reward, beta log(policy / reference)"),
    ("python:FILE.py:FUNCTION", "your function: takes a list of {prompt, completion} rows, returns floats"),
    ("http://HOST:PORT/PATH", "your server: takes the same rows as JSON; see dpoctl docs options"),
    ("mean:SCORER,SCORER", "several of these as one: their mean, or with min: the lowest score"),
)
