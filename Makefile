# make demo: the whole story in small, from the shipped backbone.   make demo SMOKE=1: every stage, few steps.
# make test: the tests.   make test-gpu: what only a GPU can run.   make test-vllm: the vLLM backend.   make lint: ruff.   Each sets up .venv first. SEED=1 make demo: another seed.
PYTHON ?= python3
SEED ?= 0
OUT ?= out/demo
PY := .venv/bin/python
ifdef SMOKE
ARENA := --sft-clips 12 --rl-clips 6 --test-clips 3
SFT := --steps 12
RL := --steps 2 --num-prompts 2 --min-format-rate 0 --min-tool-rate 0
else
ARENA :=
SFT :=
RL :=
endif

REWARDS ?= v1 v2 videobrain

.PHONY: demo rewards test test-gpu test-vllm lint clean
demo: .venv/.installed
	rm -rf $(OUT)
	$(PY) -m data_prep.arena --out $(OUT)/arena --seed $(SEED) $(ARENA)
	$(PY) -m data_prep.teacher --data $(OUT)/arena --seed $(SEED)
	$(PY) train.py --data $(OUT)/arena/trajectories.jsonl --out $(OUT)/sft --seed $(SEED) $(SFT)
	$(PY) rl.py --model $(OUT)/sft/model --data $(OUT)/arena/rl.jsonl --out $(OUT)/rl --seed $(SEED) $(RL)
	$(PY) eval.py --model assets/nano-backbone --name backbone --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_backbone.json
	$(PY) eval.py --model $(OUT)/sft/model --name SFT --modes tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_sft.json
	$(PY) eval.py --model $(OUT)/rl/model --name SFT+RL --modes no-tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_no_tool.json
	$(PY) eval.py --model $(OUT)/rl/model --name SFT+RL --modes tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_rl.json
	$(PY) infer.py $(OUT)/arena/clips/test_00000.mp4 "Call the decisive play." --model $(OUT)/rl/model --page $(OUT)/episode.html
	$(PY) -m nanosport.bench.demo $(OUT)

# The rewards beside each other, from one SFT model of a seed: make rewards SEED=0; then the table of
# all seeds: .venv/bin/python -m nanosport.bench.rewards out/rewards/seed*
rewards: OUT := out/rewards/seed$(SEED)
rewards: .venv/.installed
	rm -rf $(OUT)
	$(PY) -m data_prep.arena --out $(OUT)/arena --seed $(SEED) $(ARENA)
	$(PY) -m data_prep.teacher --data $(OUT)/arena --seed $(SEED)
	$(PY) train.py --data $(OUT)/arena/trajectories.jsonl --out $(OUT)/sft --seed $(SEED) $(SFT)
	$(PY) -m data_prep.difficulty $(OUT)/arena/rl.jsonl --out $(OUT)/arena/rl_measured.jsonl --seed $(SEED)
	for reward in $(REWARDS); do \
	  $(PY) rl.py --model $(OUT)/sft/model --data $(OUT)/arena/rl_measured.jsonl --reward $$reward --out $(OUT)/$$reward --seed $(SEED) $(RL) && \
	  $(PY) eval.py --model $(OUT)/$$reward/model --name $$reward --modes tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_$$reward.json || exit 1; \
	done

test: .venv/.installed
	$(PY) -m pytest -q -n 2 --dist loadfile

# without conftest.py, which hides the GPU
test-gpu: .venv/.installed
	$(PY) -m pytest -q -rs --noconftest tests/test_gpu.py

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q tests/test_vllm.py

lint: .venv/.installed
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

# torchvision is a CUDA build: on a CPU it imports without what registers its operators
.venv-vllm/.installed: requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --no-deps -r requirements-vllm.txt
	cp /dev/null .venv-vllm/lib/python*/site-packages/torchvision/_meta_registrations.py
	touch $@

clean:
	rm -rf .venv .venv-vllm out
