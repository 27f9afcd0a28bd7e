# Objects of the soak's own C programs at several levels, made by many processes at once: `make -f objects.mk -C SOURCES OUT=DIRECTORY`.
SOURCES := selfcheck threads spaces forks large clock
LEVELS := 0 2
OBJECTS := $(foreach level,$(LEVELS),$(SOURCES:%=$(OUT)/%-$(level).o))

all: $(OBJECTS)

define LEVEL
$(OUT)/%-$(1).o: %.c
	@gcc -O$(1) -c -o $$@ $$<
endef
$(foreach level,$(LEVELS),$(eval $(call LEVEL,$(level))))
