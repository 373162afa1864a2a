# make demo: the whole story in small, from the shipped backbone.   make demo SMOKE=1: every stage, few steps.
# make demo FAMILY=qwen3_vl: on the second family's backbone, into out/demo_qwen3_vl.
# make test: the tests.   make test-gpu: what only a GPU can run.   make test-vllm: the vLLM backend.   make test-extras: the local server, trackers.   make lint: ruff.   Each sets up .venv first. SEED=1 make demo: another seed.
PYTHON ?= python3
SEED ?= 0
FAMILY ?= qwen2_5_vl
BACKBONE_qwen2_5_vl := assets/nano-backbone
BACKBONE_qwen3_vl := assets/nano-backbone-qwen3-vl
BACKBONE := $(or $(BACKBONE_$(FAMILY)),$(error FAMILY=$(FAMILY): must be qwen2_5_vl or qwen3_vl))
OUT ?= out/demo$(filter-out _qwen2_5_vl,_$(FAMILY))
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

.PHONY: demo ablate test test-gpu test-vllm test-extras lint clean
demo: .venv/.installed
	rm -rf $(OUT)
	$(PY) -m data_prep.arena --out $(OUT)/arena --seed $(SEED) $(ARENA)
	$(PY) -m data_prep.teacher --data $(OUT)/arena --seed $(SEED)
	$(PY) train.py --model $(BACKBONE) --data $(OUT)/arena/trajectories.jsonl --out $(OUT)/sft --seed $(SEED) $(SFT)
	$(PY) rl.py --model $(OUT)/sft/model --data $(OUT)/arena/rl.jsonl --out $(OUT)/rl --seed $(SEED) $(RL)
	$(PY) eval.py --model $(BACKBONE) --name backbone --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_backbone.json
	$(PY) eval.py --model $(OUT)/sft/model --name SFT --modes tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_sft.json
	$(PY) eval.py --model $(OUT)/rl/model --name SFT+RL --modes no-tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_no_tool.json
	$(PY) eval.py --model $(OUT)/rl/model --name SFT+RL --modes tool --data $(OUT)/arena/test.jsonl --out $(OUT)/eval_rl.json
	$(PY) infer.py $(OUT)/arena/clips/test_00000.mp4 "Call the decisive play." --model $(OUT)/rl/model --page $(OUT)/episode.html
	$(PY) -m nanosport.bench.demo $(OUT)

# What each term of the reward does, over three seeds: hours on two cores. It goes on where it was
# stopped; one row alone: .venv/bin/python -m nanosport.bench.ablate --rows v2 --seeds 0
ablate: .venv/.installed
	$(PY) -m nanosport.bench.ablate $(if $(SMOKE),--smoke --out out/ablate_smoke)

test: .venv/.installed
	$(PY) -m pytest -q -n 2 --dist loadfile

# without conftest.py, which hides the GPU
test-gpu: .venv/.installed
	$(PY) -m pytest -q -rs --noconftest tests/test_gpu.py

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q tests/test_vllm.py

# what is an optional extra is installed for it
test-extras: .venv/.installed
	$(PY) -m pip install -q -r requirements-serve.txt -r requirements-track.txt
	$(PY) -m pip install -q openai || echo "no OpenAI client: the test with it is skipped"
	$(PY) -m pytest -q tests/test_serve.py tests/test_heldout.py -k "serve or tracker or tensorboard"

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
