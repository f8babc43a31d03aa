# Targets explain themselves: `make` or `make help` prints them.
GO       ?= go
BIN      := bin
TOOLS    := $(BIN)/tools
PKGS     := ./...
TESTED   := ./server ./cmd/trivet $(PKGS) # the slowest first: the others are tested beside them
VERSION  ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 20s
SEED     ?= 1
VMRUN    ?= TestVM|TestAttachReadWriteDetach
FIRST    ?= $(SEED)
FLIPS    ?= 10000
SEEDS    ?= 20
ARCHS    ?= amd64 arm64
export GOFLAGS := -mod=readonly

.DEFAULT_GOAL := help
.PHONY: help build test race check lint fmt generate testdata sanity demo bench bench-adaptive bench-go bench-engine bench-replication scrub fuzz sim sim-mutants sim-long chaos \
	models image e2e-build e2e e2e-smoke e2e-chart e2e-upstream vm-test tools deps clean manifests chart binaries

help: ## print this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/trivet, the one binary (static)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/trivet ./cmd/trivet

test: build ## run every test (root and /dev/fuse give the ones on real devices too)
	$(GO) test -timeout 20m $(TESTED)
	cd tools && GOFLAGS= $(GO) test ./image
	cd e2e && GOFLAGS= $(GO) test -short ./...

race: ## run the unit tests under the race detector (-short)
	GO=$(GO) internal/testutil/race.sh $(TESTED)

check: ## format, vet, lint, tidy and generated code: all clean (what CI runs first)
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "gofmt would change:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet $(PKGS)
	cd tools && GOFLAGS= $(GO) vet ./image
	cd e2e && GOFLAGS= $(GO) vet ./...
	$(GO) mod tidy -diff
	$(MAKE) --no-print-directory lint

lint: $(TOOLS)/golangci-lint ## run golangci-lint and the rules in internal/lint
	$(TOOLS)/golangci-lint run $(PKGS)
	$(GO) test ./internal/lint

fmt: $(TOOLS)/golangci-lint ## format the code
	$(TOOLS)/golangci-lint fmt $(PKGS)

generate: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## regenerate api/*.pb.go (needs protoc)
	PATH="$(CURDIR)/$(TOOLS):$$PATH" protoc --proto_path=api --go_out=api --go_opt=paths=source_relative \
		--go-grpc_out=api --go-grpc_opt=paths=source_relative admin.proto

testdata: ## rewrite the expectations of the datadriven scripts; read the diff
	$(GO) test ./controller/meta ./engine ./replication -rewrite

sanity: build $(TOOLS)/csi-sanity ## run csi-sanity in process and as a binary against a socket (root)
	sanity/run.sh $(TOOLS)/csi-sanity

demo: build ## three servers, one volume, the death of its leader (root; at most 60 s)
	$(GO) build -o $(BIN)/demo ./internal/demo
	$(BIN)/demo -trivet $(BIN)/trivet

bench: build ## measure against peers into docs/benchmarks.md; idle machine, root, 40 minutes: make bench QUICK=1 PEERS=ceph
	$(GO) build -o $(BIN)/bench ./internal/bench
	$(BIN)/bench -trivet $(BIN)/trivet $(if $(QUICK),-quick) $(if $(PEERS),-peers $(PEERS)) $(BENCH)

bench-adaptive: build ## 10 interleaved pairs with and without adaptive write-back; idle machine, fio, 10 minutes
	$(GO) build -o $(BIN)/bench ./internal/bench
	$(BIN)/bench -trivet $(BIN)/trivet -pairs 10 -size 512 -seconds 8 $(BENCH)

bench-go: ## run the Go benchmarks
	$(GO) test -run '^$$' -bench . -benchtime 1s $(PKGS)

fuzz: ## run every fuzz target for FUZZTIME (default 20s)
	./internal/testutil/fuzz.sh $(FUZZTIME)

bench-engine: ## measure the engine in ratios, as docs/benchmarks.md says; idle machine, 15 minutes: make bench-engine ENGINEBENCH='-mib 4096'
	$(GO) test -run '^$$' -bench . -benchtime 1s ./engine ./engine/segment
	$(GO) run ./internal/enginebench $(ENGINEBENCH)

scrub: ## flip 10 000 bits on real disks of a cluster, and scrub: all found and repaired, none served (2 minutes)
	$(GO) test ./replication -count=1 -timeout 20m -run TestScrubFindsAllFlips -v -flips $(FLIPS)

bench-replication: ## measure replication against plain files, in ratios; needs fio and an idle machine, 5 minutes
	$(GO) run ./internal/replbench $(REPLBENCH)

sim: ## run the simulator, 3 simulated minutes a seed: make sim SEEDS=40 FIRST=7
	$(GO) test ./internal/sim -count=1 -timeout 60m -run 'TestSim$$' -v -first $(FIRST) -seeds $(SEEDS)

sim-mutants: ## remove defences one at a time and see that the simulator notices: builds of its own, about 5 minutes
	$(GO) test ./internal/sim -count=1 -timeout 60m -run 'TestMutants$$' -v -mutants

sim-long: ## the same for hours: 500 seeds of 10 simulated minutes, from FIRST on
	$(GO) test ./internal/sim -count=1 -timeout 24h -run 'TestSim$$' -v -first $(FIRST) -seeds 500 -duration 10m

chaos: build ## break a real cluster in network namespaces for a minute: make chaos SEED=7 (root, nftables)
	$(GO) build -o $(BIN)/chaos ./internal/chaos
	$(BIN)/chaos -trivet $(BIN)/trivet -seed $(SEED)

models: ## check the models of the durability gates with SPIN (packages spin and gcc; about 4 minutes)
	docs/models/run.sh -o $(BIN)/models

image: build ## write bin/trivet-image.tar, the container image as an OCI archive (Debian; IMAGE=name:tag)
	GO='$(GO)' IMAGE='$(IMAGE)' VERSION='$(VERSION)' deploy/image.sh $(BIN)

manifests: $(TOOLS)/chart ## make deploy/*.yaml, images.txt and the table in docs/helm.md from the Helm chart
	$(TOOLS)/chart -deploy deploy

chart: $(TOOLS)/chart ## lint the Helm chart, render it with every value, and see that the manifests are made from it
	$(TOOLS)/chart -deploy deploy -lint
	cd tools/chart && GOFLAGS= $(GO) vet . && GOFLAGS= $(GO) test -count=1 .

binaries: ## build bin/linux/ARCH/trivet for the Dockerfile (ARCHS="amd64 arm64")
	for arch in $(ARCHS); do CGO_ENABLED=0 GOOS=linux GOARCH=$$arch $(GO) build -trimpath -ldflags '$(LDFLAGS)' \
		-o $(BIN)/linux/$$arch/trivet ./cmd/trivet || exit 1; done

e2e-build: ## build Kubernetes, etcd and the sidecars for e2e-smoke, once (up to 40 minutes; kept outside the tree)
	e2e/build.sh

e2e-smoke: e2e-build image ## the manifests in deploy/ on a real Kubernetes of three nodes on this machine (root; 5 minutes)
	cd e2e && GOFLAGS= $(GO) test ./smoke -run TestSmoke -count=1 -timeout 15m -v

e2e: e2e-build image ## the manifests with all sidecars, deploy/full: snapshots, clones, growth, drain, update (root; 10 minutes)
	cd e2e && GOFLAGS= $(GO) test ./smoke -run TestEverything -count=1 -timeout 30m -v

e2e-chart: image ## the Helm chart on that Kubernetes: install, labels of nodes, upgrade, uninstall (root; 6 minutes, and 2 to build Helm once)
	e2e/build.sh --helm
	cd e2e && GOFLAGS= $(GO) test ./smoke -run TestChart -count=1 -timeout 30m -v

e2e-upstream: image ## Kubernetes' own tests of storage drivers, into docs/conformance.md (root; 30 minutes, and some to build once)
	e2e/build.sh --upstream
	cd e2e && GOFLAGS= $(GO) test ./smoke -run TestUpstream -count=1 -timeout 170m -v

vm-test: ## kernel NBD and ublk in a guest of a Debian kernel: attach, kill -9, resume, fsck, grow (3 minutes)
	kernel=$$(internal/vm/fetch.sh) && $(GO) run ./internal/vm/vmtest -kernel "$$kernel" -run '$(VMRUN)' -v ./node/blockdev

tools: $(TOOLS)/golangci-lint $(TOOLS)/csi-sanity $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## build the pinned tools

deps: ## install what the tests need beyond Go (Debian, root)
	apt-get update -qq && apt-get install -y -qq --no-install-recommends \
		e2fsprogs xfsprogs util-linux fio libnbd-bin nbdkit qemu-utils protobuf-compiler iproute2 nftables spin gcc >/dev/null

clean: ## remove what make built
	rm -rf $(BIN)

$(TOOLS)/golangci-lint: tools/golangci/go.mod
	cd tools/golangci && GOFLAGS= $(GO) build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(TOOLS)/csi-sanity: tools/go.mod
	cd tools && GOFLAGS= $(GO) build -o ../$@ github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity

$(TOOLS)/protoc-gen-go: tools/go.mod
	cd tools && GOFLAGS= $(GO) build -o ../$@ google.golang.org/protobuf/cmd/protoc-gen-go

$(TOOLS)/protoc-gen-go-grpc: tools/go.mod
	cd tools && GOFLAGS= $(GO) build -o ../$@ google.golang.org/grpc/cmd/protoc-gen-go-grpc

$(TOOLS)/chart: $(wildcard tools/chart/*.go) tools/chart/go.mod
	cd tools/chart && GOFLAGS= $(GO) build -o ../../$@ .
