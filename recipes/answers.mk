# Rules of the tasks with given preferences, measured by the win rate against the human answer; shared by recipes/hh,
# recipes/tldr and recipes/cnn-dm. A recipe sets TASK, SFT (the reference), BASE (the base model) and METHODS (what is
# judged), and includes this file. Targets are manifests: rerunning make resumes what was interrupted.
# The command: dpoctl of `make install` if there is one, else of the PATH.
DPOCTL ?= $(firstword $(wildcard $(abspath ../../.venv/bin/dpoctl)) dpoctl)
# The command for training stages, if it is another one (torchrun).
TRAIN_DPOCTL ?= $(DPOCTL)
PYTHON ?= $(firstword $(wildcard $(abspath ../../.venv/bin/python)) python3)
W ?= runs
# A file of the task's rows (.jsonl, .jsonl.gz, .csv, .parquet); empty: the data set of the Hub.
SOURCE ?=
BEST_OF ?= 128
# The judge; its key is read from OPENAI_API_KEY. Another server: JUDGE="--model NAME --base-url http://localhost:8000/v1".
JUDGE ?= --model gpt-5.2
# Folder of the policies.
POLICIES ?= $(W)

WORLD := $(W)/$(TASK)
TEST := $(WORLD)/prompts.test.jsonl
RUN = $(1) $(2) --config recipe.yaml
SAMPLES := $(METHODS:%=$(W)/samples.%.jsonl)
WINS := $(METHODS:%=$(W)/wins.%.jsonl)
POINTS := --eval-prompts $(TEST) --scorer $(W)/rm --keep-samples $(POINT_FLAGS)
# Manifest of the reference, if it is trained here.
SFT_DONE ?= $(WORLD)/manifest.json

.PHONY: all smoke clean
all: $(W)/report/manifest.json

$(WORLD)/manifest.json: recipe.yaml
	$(call RUN,$(DPOCTL),prepare $(TASK)) $(if $(SOURCE),--source $(SOURCE)) --out $(WORLD)

# --- policies

$(W)/preferred-ft/manifest.json: $(PREFERRED_FT_FROM)
	$(call RUN,$(TRAIN_DPOCTL),sft) --model $(PREFERRED_FT_BASE) --field chosen --data $(WORLD)/prefs.train.jsonl $(TRAIN_FLAGS) --out $(W)/preferred-ft

$(W)/rm/manifest.json: $(SFT_DONE)
	$(call RUN,$(TRAIN_DPOCTL),train-rm) --model $(SFT) --data $(WORLD)/prefs.train.jsonl --eval-data $(WORLD)/prefs.test.jsonl $(TRAIN_FLAGS) --out $(W)/rm

$(W)/dpo/manifest.json: $(SFT_DONE) $(W)/rm/manifest.json
	$(call RUN,$(TRAIN_DPOCTL),train-dpo) --model $(SFT) --data $(WORLD)/prefs.train.jsonl --eval-data $(WORLD)/prefs.test.jsonl $(POINTS) $(TRAIN_FLAGS) --out $(W)/dpo

$(W)/ppo/manifest.json: $(SFT_DONE) $(W)/rm/manifest.json
	$(call RUN,$(TRAIN_DPOCTL),train-ppo) --model $(SFT) --prompts $(WORLD)/prompts.train.jsonl --reward $(W)/rm $(POINTS) $(PPO_FLAGS) --out $(W)/ppo

# --- samples and win rates

SAMPLE = $(call RUN,$(DPOCTL),sample) --prompts $(TEST) $(SAMPLE_FLAGS)

$(W)/samples.sft.jsonl.manifest.json: $(SFT_DONE)
	$(SAMPLE) --model $(SFT) --out $(W)/samples.sft.jsonl

$(W)/samples.base.jsonl.manifest.json: $(WORLD)/manifest.json
	$(if $(SHOTS),head -n $(SHOTS) $(WORLD)/sft.jsonl > $(W)/shots.jsonl)
	$(SAMPLE) --model $(BASE) $(if $(SHOTS),--few-shot $(W)/shots.jsonl) $(BASE_FLAGS) --out $(W)/samples.base.jsonl

$(W)/samples.best-of-%.jsonl.manifest.json: $(SFT_DONE) $(W)/rm/manifest.json
	$(SAMPLE) --model $(SFT) --best-of $* --scorer $(W)/rm $(BEST_FLAGS) --out $(W)/samples.best-of-$*.jsonl

$(W)/samples.%.jsonl.manifest.json: $(if $(filter $(W),$(POLICIES)),$(W)/%/manifest.json,$(WORLD)/manifest.json)
	$(SAMPLE) --model $(POLICIES)/$* --out $(W)/samples.$*.jsonl

$(W)/wins.%.jsonl.manifest.json: $(W)/samples.%.jsonl.manifest.json
	$(call RUN,$(DPOCTL),judge) $(W)/samples.$*.jsonl $(JUDGE) --out $(W)/wins.$*.jsonl

# Win rate along DPO's training: the completions of its evaluation points.
$(W)/along.dpo.jsonl.manifest.json: $(W)/dpo/manifest.json
	$(call RUN,$(DPOCTL),judge) $(W)/dpo/samples.jsonl $(JUDGE) --out $(W)/along.dpo.jsonl

# Samples are named here so that they are no intermediate files, which make removes, and does not miss.
$(W)/report/manifest.json: $(SAMPLES:%=%.manifest.json) $(WINS:%=%.manifest.json) $(ALONG:%=%.manifest.json) $(RUNS:%=$(W)/%/manifest.json)
	$(call RUN,$(DPOCTL),report) $(RUNS:%=$(W)/%) $(WINS) $(ALONG) $(SAMPLES) --title "$(TITLE)" --out $(W)/report

# --- the same chain offline on generated tiny models: about twenty seconds on two cores

SMOKE := smoke
smoke:
	rm -rf $(SMOKE)
	OMP_NUM_THREADS=1 $(PYTHON) $(firstword $(wildcard tiny.py ../tiny.py)) $(TASK) $(SMOKE)/tiny
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 W=$(SMOKE) SOURCE=$(SMOKE)/tiny/source.jsonl BEST_OF=3 $(SMOKE_WITH) \
	  TRAIN_FLAGS="--max-steps 2 --batch-size 8 --warmup-steps 1" POINT_FLAGS="--eval-every 1 --eval-limit 4 --max-new-tokens 8" \
	  PPO_FLAGS="--max-steps 1 --batch-size 8 --minibatch-size 8" \
	  SAMPLE_FLAGS="--limit 4 --temperature 0.5,1 --max-new-tokens 8" BEST_FLAGS="" JUDGE="--backend scorer --scorer $(SMOKE)/tiny/classifier"

clean:
	rm -rf $(W) $(SMOKE)
