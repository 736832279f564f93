# Two commands do all the set-up on a fresh Debian 12 with Rust: `make demo` and `make test`.

# What building and testing need beside Rust. qemu: the machine nested Xen runs on; libxen-dev and
# libclang: xenctrl-sys makes its bindings from Xen's headers; gcc, binutils and libelf1: payloads are built by
# kbuild, whose objtool links libelf and libcrypto; xz and zstd unpack kernels; e2fsprogs makes a dom0's disk.
PACKAGES = qemu-system-x86 libxen-dev libclang1-14 libclang-common-14-dev gcc binutils libc6-dev make \
	pkg-config libelf1 libssl3 xz-utils zstd util-linux e2fsprogs debian-archive-keyring

SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
XTEST = cargo run --release -p xtest --
DESTDIR =
PREFIX = /usr

.PHONY: all deps build demo test test-matrix report lint unit nested bench fuzz install install-files clean

all: build

# Nothing is done, and no network used, when all is there.
deps:
	@missing=""; for p in $(PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; \
	done; \
	if [ -n "$$missing" ]; then \
		echo "installing:$$missing"; \
		$(SUDO) apt-get -qq update && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null; \
	fi

build: deps
	cargo build --release

demo: deps
	$(XTEST) demo

test: lint unit nested

lint: deps
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --quiet --workspace --no-deps --locked
	@sh deploy/check-tree.sh

unit: deps
	cargo test --workspace --locked

nested: deps
	$(XTEST) run

# All scenarios, for hours; downloads the kernels of four releases of Debian. Each result holds as long as what
# it depends on is unchanged: `make test-matrix MISSING=1` runs what has not passed since then, `PART=2/4` a share.
test-matrix: deps
	$(XTEST) run --matrix $(if $(MISSING),--missing) $(if $(PART),--part $(PART))

# The results that hold for the sources as they are, and what is missing. `make report RECORD=1` keeps what passed in the
# tree, xtest/matrix.json, for other machines and later sittings.
report:
	@$(XTEST) report $(if $(RECORD),--record)

bench: deps
	$(XTEST) bench
	$(XTEST) bench --clock host --only base --only calls
	$(XTEST) bench --clock host --reading

# Seconds for each target of the fuzzer.
SECONDS = 20

fuzz: deps
	@sh fuzz/run.sh $(SECONDS)

# The folder of the programs to install.
BUILT = target/release

install: build install-files

# What is built already.
install-files:
	install -D -m 755 $(BUILT)/xen-locus $(DESTDIR)$(PREFIX)/sbin/xen-locus
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's,/usr/sbin,$(PREFIX)/sbin,' deploy/xen-locus.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/xen-locus.service
	install -d $(DESTDIR)$(PREFIX)/share/man/man8
	$(BUILT)/locus-man $(DESTDIR)$(PREFIX)/share/man/man8
	install -D -m 644 deploy/xen-locus-xenstore.7 $(DESTDIR)$(PREFIX)/share/man/man7/xen-locus-xenstore.7
	install -D -m 644 deploy/xen-locus.logrotate $(DESTDIR)/etc/logrotate.d/xen-locus
	install -d -m 755 $(DESTDIR)/var/lib/xen-locus/payloads

clean:
	cargo clean
