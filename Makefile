# Stellarium from the command line: each target does one whole job, installing what it lacks from
# Debian's packages first. `make help` lists them. CMake does the building; nothing is built here.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

JOBS  ?= $(shell nproc)
HOURS ?= 1
PREFIX ?= /usr/local
DESTDIR ?=

.DEFAULT_GOAL := build
.PHONY: help deps build test test-only lint format asan tsan fuzz demo crash \
        bench bench-smoke bench-micro install package package-test clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## Install what a build and the tests need
	@scripts/install-deps.sh build test

build: ## Build everything (preset dev, in build/dev)
	@scripts/install-deps.sh build
	@scripts/build.sh dev

test: ## Install what is missing, build, and run every test
	@scripts/install-deps.sh build test
	@scripts/build.sh dev
	@scripts/run-tests.sh dev

test-only: ## Run the tests of what is already built; T=REGEX picks some by name
	@scripts/run-tests.sh dev $(if $(T),-R '$(T)')

lint: ## clang-format, clang-tidy, shellcheck and the style checks
	@scripts/install-deps.sh build lint
	@scripts/lint.sh

format: ## Rewrite the C++ sources as clang-format wants them
	@scripts/install-deps.sh lint
	@scripts/lint.sh --fix-format

asan: ## Build and test under AddressSanitizer and UndefinedBehaviorSanitizer; SKIP=LABELS leaves some out
	@scripts/install-deps.sh build test
	@SKIP_LABELS='$(SKIP)' scripts/build.sh asan
	@scripts/run-tests.sh asan --label-exclude 'system|style$(if $(SKIP),|$(SKIP))'

tsan: ## Build and test under ThreadSanitizer; SKIP=LABELS leaves some out
	@scripts/install-deps.sh build test
	@SKIP_LABELS='$(SKIP)' scripts/build.sh tsan
	@scripts/run-tests.sh tsan --label-exclude 'system|style$(if $(SKIP),|$(SKIP))'

fuzz: ## Build the fuzz targets and run each for FUZZ_SECONDS (default 60)
	@scripts/install-deps.sh build fuzz
	@scripts/build.sh fuzz
	@scripts/fuzz.sh

crash: ## Run the crash tests with fresh seeds for HOURS=n
	@scripts/install-deps.sh build test
	@scripts/build.sh dev
	@scripts/crash.sh '$(HOURS)'

demo: ## The main job on real input: import, 1,000 clones, two guests in QEMU
	@scripts/install-deps.sh build demo
	@scripts/build.sh release
	@scripts/demo.py

bench: ## Benchmarks beside the tools that people use today; ONLY=REGEX picks some
	@scripts/install-deps.sh build test bench
	@scripts/build.sh release
	@bench/suite/run.py $(if $(ONLY),--only '$(ONLY)')

bench-smoke: ## A short run of the benchmarks; fails only far beyond a target
	@scripts/install-deps.sh build test bench
	@scripts/build.sh release
	@bench/suite/run.py --smoke $(if $(ONLY),--only '$(ONLY)')

bench-micro: ## The inner loops alone; T=REGEX picks some programs
	@scripts/install-deps.sh build bench
	@scripts/build.sh release
	@scripts/bench.sh '$(T)'

install: ## Install into PREFIX (default /usr/local) below DESTDIR
	@scripts/install-deps.sh build
	@scripts/build.sh release
	@DESTDIR='$(DESTDIR)' cmake --install build/release --prefix '$(PREFIX)'

package: ## Build the Debian package (in build/release)
	@scripts/install-deps.sh build package
	@scripts/build.sh release
	@cd build/release && cpack -G DEB --config CPackConfig.cmake

package-test: package ## Install the package into a clean Debian and use it there
	@scripts/package-test.sh build/release

clean: ## Remove the build folders
	@rm -rf build
