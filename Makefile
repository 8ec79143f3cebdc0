# `make demo` shows the whole chain on a fresh Debian or Ubuntu machine; `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# installs Debian packages where that is allowed without a password
APT = asroot=; [ "$$(id -u)" = 0 ] || asroot="sudo -n"; \
  $$asroot apt-get update -qq && $$asroot env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends >/dev/null

.PHONY: demo test setup fluidsynth clean

demo: setup
	$(BIN)/python prepare.py demo data/demo
	rm -rf runs/demo
	$(BIN)/python train.py --debug --data data/demo --logdir runs/demo
	$(BIN)/python transcribe.py runs/demo/model-best.pt data/demo/test/demo13.flac --save_path runs/demo
	@echo "written: $$(ls runs/demo/demo13_transcribed.* | tr '\n' ' ')"

test: setup
	$(BIN)/python -m pytest

setup: $(VENV)/installed fluidsynth

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(APT) python3-venv; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# the system library that plays MIDI; without root or apt the rest works, with plainer demo tones and no .wav of transcriptions
fluidsynth: $(VENV)/installed
	@$(BIN)/python -c "from audio import has_fluidsynth as h; raise SystemExit(not h())" || { \
	  $(APT) fluidsynth; } || echo "FluidSynth is missing and could not be installed here; to install it: apt-get install fluidsynth"

clean:
	rm -rf $(VENV) runs/demo data/demo
