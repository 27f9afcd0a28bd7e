# Everything a user or a CI run needs. `make help` lists the targets.
.PHONY: help run build install uninstall guests test lint deny unit-test boot-test command-test soak-test net-test debian-test cut-test fuzz bench bench-page soak clean-guests

# The parts of `make test` use the same machine, the same guests and the same binary: one after the other, under `make -j` too.
.NOTPARALLEL:

# rustup puts cargo where a shell may not look, and mke2fs and chroot are where the PATH of ordinary users does not lead.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin

CARGO ?= cargo
BOOTS ?= 5
SOAK_MINUTES ?= 3
CUTS ?= 12
FUZZ_SECONDS ?= 60
PREFIX ?= /usr/local
DESTDIR ?=
UNITS ?= $(if $(subst /usr,,$(PREFIX)),$(PREFIX)/lib,/lib)/systemd/system
# In quotes the shell leaves a ~ as it is, which not every user's shell has replaced.
at_home = $(subst :start:,,$(subst :start:~/,$(HOME)/,:start:$(1)))
override PREFIX := $(call at_home,$(PREFIX))
override DESTDIR := $(call at_home,$(DESTDIR))
# As the shell's variables they may hold spaces.
export PREFIX DESTDIR UNITS
# The monitor of this tree.
BIN := $(or $(CARGO_TARGET_DIR),target)/release/hospes
DENY_TOOL := target/tools/bin/cargo-deny

help:
	@echo 'make run                build, make a Debian disk, boot it: a shell in the guest; without a terminal, a scripted visit'
	@echo 'make test               formatting, lints, dependencies, unit tests, guests, power cuts, a soak (BOOTS=5, CUTS=12, SOAK_MINUTES=3)'
	@echo 'make debian-test        full Debian guests with disks and networks, a part of make test'
	@echo 'make cut-test           power cuts and kills under guests that write (CUTS=12)'
	@echo 'make build              build the program alone'
	@echo 'make install            what was built into PREFIX=/usr/local, with manual pages, completions and, as root, a unit for systemd; XL=1: as xl and xentop, too, with /etc/xen'
	@echo 'make uninstall          remove that again'
	@echo 'make bench              Hospes against this machine, QEMU TCG and User-Mode Linux (BENCH=quick for the first rows, ROWS=a,b, SYSTEMS=a,b, DIRECT=0|1|both)'
	@echo 'make bench-page         docs/bench-result.md and its plot from the last results'
	@echo 'make soak MINUTES=n     self-checking programs in a Debian guest for n minutes (VCPUS=2, DIRECT=0|1)'
	@echo 'make guests             fetch the kernels and make the small guests under target/guests'
	@echo 'make fuzz               all fuzz targets, FUZZ_SECONDS=60 each; needs cargo-fuzz'
	@echo 'make clean-guests       remove them and everything downloaded for them'

run: build
	guests/install.sh run
	guests/debian.sh run
	@python3 guests/run.py

build:
	guests/install.sh build
	$(CARGO) build --release -p hospes

# What was built is installed as it is: root needs no Rust for it. Manual pages and completions are made by the program itself, of the
# tables that it reads arguments and configurations by. The unit and its directory are the host's, so they take root or a DESTDIR.
# XL=1 is for programs that call xl: many know it as /usr/sbin/xl, and write configurations into /etc/xen.
install:
	@test -x '$(BIN)' || { echo '$(BIN) is not there: run `make build` first, as the user whose checkout it is' >&2; exit 2; }
	install -D -m 755 '$(BIN)' "$$DESTDIR$$PREFIX/bin/hospes"
	@set -e; made=$$(mktemp -d); trap 'rm -rf "$$made"' EXIT; \
	put() { echo "install -D -m 644 $$1 $$DESTDIR$$2"; install -D -m 644 "$$made/$$1" "$$DESTDIR$$2"; }; \
	'$(BIN)' manual hospes.1 > "$$made/hospes.1"; \
	'$(BIN)' manual hospes.cfg.5 > "$$made/hospes.cfg.5"; \
	'$(BIN)' completions bash > "$$made/hospes"; \
	'$(BIN)' completions zsh > "$$made/_hospes"; \
	'$(BIN)' completions fish > "$$made/hospes.fish"; \
	put hospes.1 "$$PREFIX/share/man/man1/hospes.1"; \
	put hospes.cfg.5 "$$PREFIX/share/man/man5/hospes.cfg.5"; \
	put hospes "$$PREFIX/share/bash-completion/completions/hospes"; \
	put _hospes "$$PREFIX/share/zsh/site-functions/_hospes"; \
	put hospes.fish "$$PREFIX/share/fish/vendor_completions.d/hospes.fish"; \
	if [ -n "$$DESTDIR" ] || [ "$$(id -u)" = 0 ]; then \
	    sed "s|@PREFIX@|$$PREFIX|" systemd/hospes-domains.service.in > "$$made/hospes-domains.service"; \
	    put hospes-domains.service "$$UNITS/hospes-domains.service"; \
	    install -d -m 755 "$$DESTDIR/etc/hospes/auto"; \
	else \
	    echo 'not root: without the unit that starts domains with the host'; \
	fi
	@if [ -n "$(XL)" ]; then \
	    ln -sf hospes "$$DESTDIR$$PREFIX/bin/xl" && \
	    install -d -m 755 "$$DESTDIR$$PREFIX/sbin" && \
	    ln -sf ../bin/hospes "$$DESTDIR$$PREFIX/sbin/xl" && \
	    ln -sf ../bin/hospes "$$DESTDIR$$PREFIX/sbin/xentop" && \
	    ln -sf hospes.1 "$$DESTDIR$$PREFIX/share/man/man1/xl.1" && \
	    ln -sf hospes "$$DESTDIR$$PREFIX/share/bash-completion/completions/xl" && \
	    ln -sf hospes.fish "$$DESTDIR$$PREFIX/share/fish/vendor_completions.d/xl.fish" && \
	    if [ -n "$$DESTDIR" ] || [ "$$(id -u)" = 0 ]; then install -d -m 755 "$$DESTDIR/etc/xen/auto"; fi; \
	fi

# What is in /etc/hospes and /etc/xen stays, and domains run on; xl goes where it is ours.
uninstall:
	@if [ -z "$$DESTDIR" ] && [ -e "$$UNITS/hospes-domains.service" ] && command -v systemctl >/dev/null; then \
	    systemctl disable hospes-domains.service || :; \
	fi
	rm -f "$$DESTDIR$$PREFIX/bin/hospes" "$$DESTDIR$$PREFIX/share/man/man1/hospes.1" \
	    "$$DESTDIR$$PREFIX/share/man/man5/hospes.cfg.5" "$$DESTDIR$$PREFIX/share/bash-completion/completions/hospes" \
	    "$$DESTDIR$$PREFIX/share/zsh/site-functions/_hospes" "$$DESTDIR$$PREFIX/share/fish/vendor_completions.d/hospes.fish" \
	    "$$DESTDIR$$UNITS/hospes-domains.service"
	@ours=; \
	for link in bin/xl sbin/xl sbin/xentop share/man/man1/xl.1 share/bash-completion/completions/xl share/fish/vendor_completions.d/xl.fish; do \
	    case $$(readlink "$$DESTDIR$$PREFIX/$$link") in \
	        hospes|../bin/hospes|hospes.1|hospes.fish) rm -f "$$DESTDIR$$PREFIX/$$link"; ours=1 ;; \
	    esac; \
	done; \
	if [ -n "$$ours" ] && { [ -n "$$DESTDIR" ] || [ "$$(id -u)" = 0 ]; }; then \
	    rmdir --ignore-fail-on-non-empty "$$DESTDIR/etc/xen/auto" "$$DESTDIR/etc/xen" 2>/dev/null || :; \
	fi

guests:
	guests/install.sh build
	guests/kernels.sh
	guests/initramfs.sh

test: lint deny unit-test boot-test command-test net-test debian-test cut-test soak-test
	@echo 'make test: everything passed'

lint:
	guests/install.sh test
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

# Without default features and without optimisation it is built in a minute or two, once.
$(DENY_TOOL):
	@echo 'building cargo-deny into target/tools, once'
	$(CARGO) install --quiet cargo-deny --locked --debug --no-default-features --root target/tools

deny: $(DENY_TOOL)
	$(DENY_TOOL) --log-level error check bans licenses sources

unit-test:
	guests/install.sh test
	python3 -m unittest discover --quiet --start-directory bench
	python3 -m unittest discover --quiet --start-directory tests
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
	    $(CARGO) nextest run --release --workspace --no-fail-fast && $(CARGO) test --release --workspace --doc; \
	else \
	    $(CARGO) test --release --workspace --no-fail-fast; \
	fi

boot-test: build guests
	python3 tests/boot.py --boots $(BOOTS)

command-test: build guests
	guests/install.sh commands
	python3 tests/commands.py
	python3 tests/migration.py

net-test: build guests
	guests/install.sh net
	python3 tests/network.py

debian-test: build
	guests/install.sh debian
	guests/debian.sh test
	python3 tests/debian_guests.py

# A monitor whose disks lose what was not flushed is built beside the ordinary one, which then stands where it was.
cut-test: guests
	guests/install.sh test
	$(CARGO) build --release -p hospes --features power-cut
	cp "$${CARGO_TARGET_DIR:-target}/release/hospes" "$${CARGO_TARGET_DIR:-target}/hospes-power-cut"
	$(CARGO) build --release -p hospes
	HOSPES="$${CARGO_TARGET_DIR:-target}/hospes-power-cut" python3 tests/powercut.py --cuts $(CUTS)
	python3 tests/powercut.py --kill --cuts $(CUTS)

# Without a sanitizer, a stable compiler is enough once it is told to take what cargo-fuzz asks of it.
fuzz:
	@cargo fuzz --version >/dev/null 2>&1 || { echo 'cargo-fuzz is missing: cargo install cargo-fuzz' >&2; exit 2; }
	@for target in $$(cargo fuzz list); do \
	    echo "fuzzing $$target"; \
	    RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

soak-test:
	@$(MAKE) --no-print-directory soak MINUTES=$(SOAK_MINUTES)

bench: build
	guests/install.sh bench
	guests/kernels.sh cloud
	guests/initramfs.sh
	guests/debian.sh test
	bench/root.sh
	@python3 bench/run.py

bench-page:
	@python3 bench/page.py

soak: build
	@[ -n "$(MINUTES)" ] || { echo 'say for how long: make soak MINUTES=10' >&2; exit 2; }
	guests/install.sh soak
	guests/kernels.sh cloud
	soak/root.sh
	@python3 soak/run.py $(MINUTES) --vcpus $(or $(VCPUS),1) $(if $(DIRECT),--direct $(DIRECT))

clean-guests:
	rm -rf target/guests
