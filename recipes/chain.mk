# Rules of the chain, shared by the recipes. A recipe sets WORLD (the output of prepare), PREPARE, MODEL, SCORER and its
# sweeps, and includes this file. Targets are manifests: rerunning make resumes what was interrupted. Independent runs can
# run in parallel, by -j or as one batch job per target.
# The command: dpoctl of `make install` if there is one, else of the PATH.
DPOCTL ?= $(firstword $(wildcard $(abspath ../../.venv/bin/dpoctl)) dpoctl)
CONFIG ?= recipe.yaml
W ?= runs
BETAS ?= 0.05 0.1 1 5
TARGET_KLS ?= 3 6 9 12
GT_TARGET_KLS ?= $(TARGET_KLS)
TRL_TARGET_KLS ?= $(TARGET_KLS)
ALPHAS ?= 0.05 0.1 0.5 1
SEEDS ?= 0 1
# Losses that use the scores: coefficients of the KL, as multiples of the score's scale
DISTILL_BETAS ?= 0.05 0.1 0.3
SOFT_TAUS ?= 0.05 0.15
SCORES_FLAGS ?= --score-type prob
REF_SAMPLES ?= 64
REF_LIMIT ?= 200
# completions per prompt at the final evaluation
EVAL_N ?= 1
# what best-of-n selects by: the reward model, or a SCORER
SELECTION ?= $(W)/rm
FT_EVERY ?= 50
# with which the model of ILQL is decoded, separated by commas; empty: no ILQL
ILQL_BETAS ?= 0,1,2,4,8,16
# scored completions of each training prompt that ILQL learns from
ILQL_SAMPLES ?= 4
# DPO in rounds on the current policy, and its beta; 0: no rounds
ROUNDS ?= 3
BETA ?= 0.1
# split: a round samples its share of the prompts. same: each round samples all of them, with a seed of its own; a chain can
# be continued with more ROUNDS.
PROMPTS ?= split

RUN = $(DPOCTL) $(1) --config $(CONFIG)
TRAIN := $(WORLD)/prompts.train.jsonl
TEST := $(WORLD)/prompts.test.jsonl
POINTS := --eval-prompts $(TEST) --scorer $(SCORER)
DONE = $(1:%=$(W)/%/manifest.json)

DPO := $(BETAS:%=dpo-%)
RLHF := $(TARGET_KLS:%=ppo-%) $(GT_TARGET_KLS:%=ppo-gt-%) $(TRL_TARGET_KLS:%=ppo-gt-trl-%)
SCORES := $(DISTILL_BETAS:%=distill-%) $(SOFT_TAUS:%=soft-%)
BASELINES := $(ALPHAS:%=unlikelihood-%) $(SEEDS:%=preferred-ft-%)
FRONTIER := $(DPO) $(SCORES) $(RLHF) $(BASELINES)
SHOWN ?= sft $(DPO)
# Judged against the SFT model by the ground truth: names of runs, and best-of-N.
WINNERS ?= $(filter-out sft,$(SHOWN))

ILQL := $(if $(ILQL_BETAS),$(W)/eval.ilql.jsonl)

NUMBERS := $(if $(filter-out 0,$(ROUNDS)),$(shell seq $(ROUNDS)))
SPLIT := $(filter split,$(PROMPTS))
# What round $(1) samples, in the names of files and folders too: other shares of the prompts make another chain.
PART = $(if $(SPLIT),part-$(1)-of-$(ROUNDS),seed-$(1))
PART_FLAGS = $(if $(SPLIT),--shard $(1)/$(ROUNDS),--seed $(1))
CHAIN := $(W)/$(if $(SPLIT),split-$(ROUNDS),same)/beta-$(BETA)
IN_ROUNDS := $(NUMBERS:%=$(CHAIN)/round-%)

.PHONY: all frontier ilql stability clean
# Targets of pattern rules are kept. They are made where they are missing, whatever was complete before.
RUNS := dpo-% distill-% soft-% unlikelihood-% preferred-ft-% ppo-gt-trl-% ppo-gt-% ppo-% seed-% prompts-%
ROWS := samples.best-of-% samples.% scored.% wins.% prefs-% resampled-%
.PRECIOUS: $(addprefix $(W)/,$(addsuffix /manifest.json,$(RUNS)) $(addsuffix .jsonl.manifest.json,$(ROWS)))
ALL ?= $(W)/report/manifest.json
all: $(ALL)
frontier: $(W)/frontier/manifest.json
ilql: $(ILQL:%=%.manifest.json)
stability: $(W)/stability/manifest.json

$(WORLD)/manifest.json: $(CONFIG)
	$(call RUN,prepare $(PREPARE)) --out $(WORLD)

$(W)/sft/manifest.json: $(WORLD)/manifest.json
	$(call RUN,sft) --model $(MODEL) --data $(WORLD)/sft.jsonl --out $(W)/sft

$(W)/prefs.jsonl.manifest.json: $(W)/sft/manifest.json
	$(call RUN,make-prefs) --model $(W)/sft --prompts $(TRAIN) --scorer $(SCORER) --out $(W)/prefs.jsonl

# --- policies

$(W)/dpo-%/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,train-dpo) --model $(W)/sft --data $(W)/prefs.jsonl --beta $* $(POINTS) --out $(W)/dpo-$*

$(W)/distill-%/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,train-dpo) --loss distill --beta $* $(SCORES_FLAGS) --model $(W)/sft --data $(W)/prefs.jsonl $(POINTS) --out $(W)/distill-$*

$(W)/soft-%/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,train-dpo) --soft-labels $* --beta 1 $(SCORES_FLAGS) --model $(W)/sft --data $(W)/prefs.jsonl $(POINTS) --out $(W)/soft-$*

$(W)/unlikelihood-%/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,train-dpo) --loss unlikelihood --alpha $* --model $(W)/sft --data $(W)/prefs.jsonl $(POINTS) --out $(W)/unlikelihood-$*

$(W)/preferred-ft-%/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,sft) --field chosen --seed $* --model $(W)/sft --data $(W)/prefs.jsonl $(POINTS) --eval-every $(FT_EVERY) --out $(W)/preferred-ft-$*

$(W)/rm/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,train-rm) --model $(RM_FROM) --data $(W)/prefs.jsonl --out $(W)/rm

PPO = $(call RUN,train-ppo) --model $(W)/sft --prompts $(TRAIN) $(POINTS) $(PPO_FLAGS)

$(W)/ppo-gt-trl-%/manifest.json: $(W)/sft/manifest.json
	$(call RUN,train-ppo) --preset trl-2023 --model $(W)/sft --prompts $(TRAIN) $(POINTS) --reward $(SCORER) --target-kl $* --out $(W)/ppo-gt-trl-$*

$(W)/ppo-gt-%/manifest.json: $(W)/sft/manifest.json
	$(PPO) --reward $(SCORER) --target-kl $* --out $(W)/ppo-gt-$*

$(W)/ppo-%/manifest.json: $(W)/rm/manifest.json
	$(PPO) --reward $(W)/rm --target-kl $* --out $(W)/ppo-$*

# --- DPO in rounds: sample from the current policy, score, train it further. The KL of every round is to the SFT model.

MAKE_PREFS = $(call RUN,make-prefs) --prompts $(TRAIN) --scorer $(SCORER)
TRAIN_DPO = $(call RUN,train-dpo) $(POINTS)

# the SFT model's samples of each share: those of the first round, and of offline DPO beside the rounds
SFT_PREFS := $(foreach r,$(NUMBERS),$(W)/sft.$(call PART,$(r)).jsonl)
define SFT_PART
$(W)/sft.$(call PART,$(1)).jsonl.manifest.json: $(W)/sft/manifest.json
	$$(MAKE_PREFS) --model $(W)/sft $(call PART_FLAGS,$(1)) --out $(W)/sft.$(call PART,$(1)).jsonl
endef
$(foreach r,$(NUMBERS),$(eval $(call SFT_PART,$(r))))

# (round, its preferences, the policy before it)
define ROUND
$(CHAIN)/round-$(1)/manifest.json: $(2).manifest.json
	$$(TRAIN_DPO) --model $(3) --ref $(W)/sft --data $(2) --beta $(BETA) --out $(CHAIN)/round-$(1)
endef
define LATER_ROUND
$(CHAIN)/round-$(1).jsonl.manifest.json: $(2)/manifest.json
	$$(MAKE_PREFS) --model $(2) $(call PART_FLAGS,$(1)) --out $(CHAIN)/round-$(1).jsonl
$(call ROUND,$(1),$(CHAIN)/round-$(1).jsonl,$(2))
endef
$(if $(NUMBERS),$(eval $(call ROUND,1,$(firstword $(SFT_PREFS)),$(W)/sft)))
$(foreach r,$(filter-out 1,$(NUMBERS)),$(eval $(call LATER_ROUND,$(r),$(CHAIN)/round-$(shell expr $(r) - 1))))

# --- ILQL: one model, trained on scored samples of the SFT model, and decoded at every beta

$(W)/ilql.samples.jsonl.manifest.json: $(W)/sft/manifest.json
	$(call RUN,sample) --n $(ILQL_SAMPLES) --model $(W)/sft --prompts $(TRAIN) --out $(W)/ilql.samples.jsonl

$(W)/ilql.scored.jsonl.manifest.json: $(W)/ilql.samples.jsonl.manifest.json
	$(call RUN,score) --data $(W)/ilql.samples.jsonl --scorer $(SCORER) --out $(W)/ilql.scored.jsonl

$(W)/ilql/manifest.json: $(W)/ilql.scored.jsonl.manifest.json
	$(call RUN,train-ilql) --model $(W)/sft --data $(W)/ilql.scored.jsonl --out $(W)/ilql

$(W)/eval.ilql.jsonl.manifest.json: $(W)/ilql/manifest.json
	$(call RUN,evaluate) --n $(EVAL_N) --model $(W)/ilql --ilql-beta $(ILQL_BETAS) --ref $(W)/sft --prompts $(TEST) --scorer $(SCORER) --out $(W)/eval.ilql.jsonl

# --- evaluation

$(W)/eval.jsonl.manifest.json: $(call DONE,$(SHOWN))
	$(call RUN,evaluate) --n $(EVAL_N) $(SHOWN:%=--model $(W)/%) --ref $(W)/sft --prompts $(TEST) --scorer $(SCORER) --out $(W)/eval.jsonl

$(W)/ref.jsonl.manifest.json: $(W)/sft/manifest.json
	$(call RUN,sample) --n $(REF_SAMPLES) --limit $(REF_LIMIT) --model $(W)/sft --prompts $(TEST) --out $(W)/ref.jsonl

$(W)/curves.jsonl.manifest.json: $(W)/ref.jsonl.manifest.json $(if $(filter $(W)/rm,$(SELECTION)),$(W)/rm/manifest.json)
	$(call RUN,evaluate) --completions $(W)/ref.jsonl --selection-scorer $(SELECTION) --optimum --scorer $(SCORER) --out $(W)/curves.jsonl

$(W)/samples.best-of-%.jsonl.manifest.json: $(W)/sft/manifest.json $(W)/rm/manifest.json
	$(call RUN,sample) --best-of $* --scorer $(W)/rm --model $(W)/sft --prompts $(TEST) --out $(W)/samples.best-of-$*.jsonl

$(W)/samples.%.jsonl.manifest.json: $(W)/%/manifest.json
	$(call RUN,sample) --n 1 --model $(W)/$* --prompts $(TEST) --out $(W)/samples.$*.jsonl

$(W)/scored.%.jsonl.manifest.json: $(W)/samples.%.jsonl.manifest.json
	$(call RUN,score) --data $(W)/samples.$*.jsonl --scorer $(SCORER) --out $(W)/scored.$*.jsonl

$(W)/wins.%.jsonl.manifest.json: $(W)/samples.%.jsonl.manifest.json $(W)/samples.sft.jsonl.manifest.json
	$(call RUN,judge) $(W)/samples.$*.jsonl $(W)/samples.sft.jsonl --backend scorer --scorer $(SCORER) --criterion sentiment --out $(W)/wins.$*.jsonl

SCORED := $(SHOWN:%=$(W)/scored.%.jsonl)
WINS := $(WINNERS:%=$(W)/wins.%.jsonl)
CURVES ?= $(W)/curves.jsonl

$(W)/report/manifest.json: $(W)/eval.jsonl.manifest.json $(SCORED:%=%.manifest.json) $(WINS:%=%.manifest.json) $(CURVES:%=%.manifest.json)
	$(call RUN,report) $(SHOWN:%=$(W)/%) $(if $(CURVES),$(W)/rm) $(W)/prefs.jsonl $(W)/eval.jsonl $(CURVES) $(WINS) $(SCORED) --title "$(TITLE)" --out $(W)/report

$(W)/frontier/manifest.json: $(call DONE,$(FRONTIER) rm) $(IN_ROUNDS:%=%/manifest.json) $(W)/eval.jsonl.manifest.json $(W)/curves.jsonl.manifest.json $(ILQL:%=%.manifest.json) $(SCORED:%=%.manifest.json)
	$(call RUN,report) $(FRONTIER:%=$(W)/%) $(IN_ROUNDS) $(W)/rm $(W)/prefs.jsonl $(W)/curves.jsonl $(ILQL) $(SCORED) --title "$(TITLE): the frontier" --out $(W)/frontier

# --- stability of DPO at STABLE_BETA: training seeds, sampling seeds, smaller preference sets

STABLE_BETA ?= 0.1
STABLE_SEEDS ?= 0 1 2 3
SIZES ?= 500 1000
STABLE := $(STABLE_SEEDS:%=seed-%) $(SIZES:%=prompts-%)
RESAMPLED := $(STABLE_SEEDS:%=$(W)/resampled-%.jsonl)

$(W)/seed-%/manifest.json: $(W)/prefs.jsonl.manifest.json
	$(call RUN,train-dpo) --model $(W)/sft --data $(W)/prefs.jsonl --beta $(STABLE_BETA) --seed $* $(POINTS) --out $(W)/seed-$*

$(W)/prefs-%.jsonl.manifest.json: $(W)/sft/manifest.json
	$(call RUN,make-prefs) --limit $* --model $(W)/sft --prompts $(TRAIN) --scorer $(SCORER) --out $(W)/prefs-$*.jsonl

$(W)/prompts-%/manifest.json: $(W)/prefs-%.jsonl.manifest.json
	$(call RUN,train-dpo) --model $(W)/sft --data $(W)/prefs-$*.jsonl --beta $(STABLE_BETA) $(POINTS) --out $(W)/prompts-$*

$(W)/resampled-%.jsonl.manifest.json: $(W)/seed-0/manifest.json
	$(call RUN,evaluate) --seed $* --model $(W)/seed-0 --ref $(W)/sft --prompts $(TEST) --scorer $(SCORER) --out $(W)/resampled-$*.jsonl

$(W)/stability/manifest.json: $(call DONE,$(STABLE)) $(RESAMPLED:%=%.manifest.json)
	$(call RUN,report) $(STABLE:%=$(W)/%) $(RESAMPLED) --title "$(TITLE): seeds and sizes" --out $(W)/stability

clean:
	rm -rf $(W)
