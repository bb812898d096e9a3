# walhook. `make` alone lists what there is to make.

VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
ARGS      ?=
PKG       ?= ./...
TESTFLAGS ?=
FUZZTIME  ?= 30s
MINUTES   ?= 10
PG_BINS   ?= $(wildcard /usr/lib/postgresql/*/bin)

COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
export VERSION COMMIT
TOOLS   := bin/tools
# What would turn a connection to a throwaway Postgres elsewhere.
unexport PGSSLMODE PGSERVICE PGTARGETSESSIONATTRS PGHOST PGPORT PGUSER PGDATABASE PGOPTIONS
# The version comes from git above. Go's own stamp fails in a clone that another user owns.
export GOFLAGS := $(filter-out -buildvcs%,$(shell go env GOFLAGS)) -buildvcs=false

.DEFAULT_GOAL := help
.PHONY: help demo build image-size test judges test-matrix torture soak soak-stop soak-transaction soak-slot soak-failover soak-shutdown soak-takeover fuzz bench microbench lint lint-full fmt chart chart-docs ci deps clean dist sbom image chart-package release-check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## the whole thing on a throwaway Postgres, about 35 s; ARGS=--exit=false goes on until Ctrl-C
	@.ci/deps postgres || true
	@bin/walhook demo --exit $(ARGS)

build: ## bin/walhook, static
	@.ci/build bin/walhook

image-size: build ## that the image stays below 25 MB
	@.ci/image-size bin/walhook

test: ## all tests with the race detector, on the Postgres of this machine (PKG=, TESTFLAGS=)
	@.ci/deps cc postgres
	CGO_ENABLED=1 go test -race -timeout 12m $(TESTFLAGS) $(PKG)

judges: bin/judges/package.json ## signatures and CloudEvents, judged by npm packages and a program that receivers use (needs node and npm)
	WALHOOK_TEST_JUDGES=$(CURDIR)/bin/judges go test -run '^TestOtherPeoplesCode' -count 1 -v $(TESTFLAGS) ./sender

bin/judges/package.json: sender/testdata/judges/package.json
	@mkdir -p $(@D)
	cp sender/testdata/judges/package.json $(@D)
	cd $(@D) && npm install --ignore-scripts --no-audit --no-fund || { rm package.json; exit 1; }

test-matrix: ## all tests on each Postgres in PG_BINS (default: all that Debian has here)
	@.ci/deps cc
	@test -n "$(PG_BINS)" || { echo 'No Postgres in PG_BINS="DIR DIR …", each with initdb and postgres.'; exit 1; }
	@for bin in $(PG_BINS); do \
		"$$bin/postgres" --version || exit 1; \
		WALHOOK_TEST_PG_BIN=$$bin CGO_ENABLED=1 go test -race -count 1 -timeout 12m $(TESTFLAGS) $(PKG) || exit 1; \
	done

# Without the race detector (RACE=1 for it; `make test` has a short run with it): walhook is the test binary itself, and
# what is measured here, repeats and memory, should be those of the program that users run.
torture: ## kill everything at random and prove that nothing is lost (SEED=, MINUTES=, KILLS=, RACE=1)
	@.ci/deps $(if $(RACE),cc) postgres
	WALHOOK_TORTURE_SEED=$(SEED) WALHOOK_TORTURE_MINUTES=$(MINUTES) WALHOOK_TORTURE_KILLS=$(KILLS) CGO_ENABLED=$(if $(RACE),1,0) \
		go test $(if $(RACE),-race) -run '^TestTorture$$' -count 1 -timeout 0 -v ./cmd/walhook

# One fault, as often as TIMES says, in the world of the torture run. Each prints its figures as a line of JSON and as a
# table. WALHOOK_TEST_PG_BIN chooses the Postgres.
SOAK = @.ci/deps $(if $(RACE),cc) postgres && CGO_ENABLED=$(if $(RACE),1,0) go test $(if $(RACE),-race) -count 1 -timeout 0 -v ./cmd/walhook -run

soak: export WALHOOK_SOAK = $(MINUTES)
soak: export WALHOOK_TORTURE_SEED = $(SEED)
soak: ## all faults but the end of one walhook process, in which nothing may grow (MINUTES=, SEED=)
	$(SOAK) '^TestSoak$$'

soak-stop: export WALHOOK_SOAK_STOP = $(or $(TIMES),100)
soak-stop: ## SIGTERM under load, again and again: nothing comes twice (TIMES=)
	$(SOAK) '^TestSoakStop$$'

soak-transaction: export WALHOOK_SOAK_TRANSACTION = $(or $(ROWS),1000000)
soak-transaction: ## a large transaction, killed five times on its way (ROWS=)
	$(SOAK) '^TestSoakTransaction$$'

soak-slot: export WALHOOK_SOAK_SLOT = $(or $(TIMES),50)
soak-slot: ## the slot dropped under load, again and again: nothing is lost (TIMES=)
	$(SOAK) '^TestSoakSlot$$'

soak-failover: export WALHOOK_SOAK_FAILOVER = $(or $(TIMES),20)
soak-failover: ## the primary killed and a standby promoted under load: nothing is lost (TIMES=)
	$(SOAK) '^TestSoakFailover'

soak-shutdown: export WALHOOK_SOAK_SHUTDOWN = $(or $(TIMES),20)
soak-shutdown: ## Postgres stops and makes checkpoints while every receiver hangs: how soon (TIMES=)
	$(SOAK) '^TestSoak(Shutdown|Checkpoint)$$'

soak-takeover: export WALHOOK_SOAK_TAKEOVER = $(or $(TIMES),20)
soak-takeover: ## the holder of the slot killed, stopped, frozen: how soon another has it (TIMES=)
	$(SOAK) '^TestSoakTakeover$$'

fuzz: ## every fuzz target for FUZZTIME
	@grep -rl --include='*_test.go' '^func Fuzz' . | while read -r file; do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$file"); do \
			echo "$$(dirname $$file) $$target"; \
			go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) "$$(dirname $$file)" || exit 1; \
		done; \
	done

# Minutes. Only ratios to the limits of the same run say something on a machine that does other things too.
bench: build ## throughput, latency, memory against the limits of this machine (ARGS="--only 1,3 --scale 0.1 --json FILE --svg DIR --docs docs/performance.md --profile DIR")
	@.ci/deps postgres
	CGO_ENABLED=0 go build -trimpath -o bin/bench ./cmd/bench
	bin/bench --walhook bin/walhook $(ARGS)

microbench: ## all Go benchmarks of the packages (PKG=, TESTFLAGS=)
	@.ci/deps postgres
	go test -run '^$$' -bench . -benchmem $(TESTFLAGS) $(PKG)

lint: $(TOOLS)/staticcheck $(TOOLS)/gofumpt ## vet, staticcheck and formatting
	go vet ./...
	$(TOOLS)/staticcheck ./...
	@unformatted=$$($(TOOLS)/gofumpt -l cmd cdc outbox sender); \
		test -z "$$unformatted" || { echo "not formatted (make fmt): $$unformatted"; exit 1; }

lint-full: $(TOOLS)/golangci-lint ## golangci-lint by .golangci.yml (its first build takes minutes)
	$(TOOLS)/golangci-lint run

fmt: $(TOOLS)/gofumpt ## format the code
	$(TOOLS)/gofumpt -w cmd cdc outbox sender

chart: $(addprefix $(TOOLS)/,helm helm-unittest kubeconform helm-docs promrules kubeschemas) ## lint, render, validate and test charts/walhook (the first build of helm takes minutes)
	@.ci/chart-check

chart-docs: $(TOOLS)/helm-docs ## the chart's README from its values
	$(TOOLS)/helm-docs --chart-search-root charts

dist: ## dist/: walhook for each system that is released, with checksums; VERSION=
	@.ci/dist

sbom: build $(TOOLS)/cyclonedx-gomod ## dist/: the modules that the program was built from, as it says itself, in CycloneDX
	@mkdir -p dist
	$(TOOLS)/cyclonedx-gomod bin -json -licenses -noserial -version $(VERSION) -output dist/walhook_$(VERSION:v%=%).cdx.json bin/walhook

image: ## the container image, with docker or buildah (ENGINE=, IMAGE=, PLATFORMS=linux/amd64,linux/arm64, PUSH=1)
	@.ci/image

chart-package: $(TOOLS)/helm ## dist/: the chart as an archive
	$(TOOLS)/helm package charts/walhook --destination dist

release-check: ## that TAG=v1.2.3, the chart and the changelog have the same version
	@.ci/release-check $(TAG)

ci: ## what CI does, from installing to testing
	@.ci/run

deps: ## install what tests need and this machine lacks
	@.ci/deps make cc postgres

clean: ## remove what was built
	rm -rf bin dist

$(TOOLS)/staticcheck $(TOOLS)/gofumpt: .ci/tools/go.mod .ci/tools/go.sum
	GOBIN=$(CURDIR)/$(TOOLS) go -C .ci/tools install $(if $(filter %/gofumpt,$@),mvdan.cc/gofumpt,honnef.co/go/tools/cmd/staticcheck)
	@touch $@

# Not among the tools of .ci/tools: its hundreds of dependencies would set theirs.
$(TOOLS)/golangci-lint: Makefile
	GOBIN=$(CURDIR)/$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
	@touch $@

# What cannot be built is left out by .ci/chart-check, with a line that says so.
$(TOOLS)/helm $(TOOLS)/helm-unittest $(TOOLS)/kubeconform: .ci/chart/go.mod .ci/chart/go.sum
	-CGO_ENABLED=0 GOBIN=$(CURDIR)/$(TOOLS) go -C .ci/chart install -trimpath -ldflags "-s -w" $(if $(filter %/helm,$@),helm.sh/helm/v4/cmd/helm,$(if $(filter %/kubeconform,$@),github.com/yannh/kubeconform/cmd/kubeconform,github.com/helm-unittest/helm-unittest/cmd/helm-unittest))
	-@touch -c $@

$(TOOLS)/cyclonedx-gomod: Makefile
	GOBIN=$(CURDIR)/$(TOOLS) go install github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.9.0
	@touch $@

$(TOOLS)/promrules $(TOOLS)/kubeschemas: .ci/charttools/go.mod .ci/charttools/go.sum $(wildcard .ci/charttools/*/*.go)
	-CGO_ENABLED=0 GOBIN=$(CURDIR)/$(TOOLS) go -C .ci/charttools install -trimpath -ldflags "-s -w" ./$(@F)
	-@touch -c $@

$(TOOLS)/helm-docs: Makefile
	-CGO_ENABLED=0 GOBIN=$(CURDIR)/$(TOOLS) go install -trimpath -ldflags "-s -w" github.com/norwoodj/helm-docs/cmd/helm-docs@v1.14.2
	-@touch -c $@
