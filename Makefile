# Everything a user or a CI run needs. `make help` lists the targets.
.PHONY: help run guests test bench soak clean-guests

help:
	@echo 'make run              build, fetch a Debian kernel, boot it: a shell in the guest, or a scripted visit without a terminal'
	@echo 'make guests           fetch the kernels and make the small guests under target/guests'
	@echo 'make test             formatting, lints, dependencies, unit tests, guest boots, a short soak'
	@echo 'make bench            the benchmark on the machine itself, QEMU TCG, User-Mode Linux and Hospes (BENCH=quick, ROWS=, SYSTEMS=)'
	@echo 'make soak MINUTES=n   self-checking programs in a Debian guest for n minutes'

guests:
	guests/kernels.sh
	guests/initramfs.sh
