/*
 * Memory: memory NAME..., NAME one of
 *   mem_copy    memcpy between two areas of 32 MB; GB/s, bytes read and written both counted
 *   mem_triad   a[i] = b[i] + s * c[i] over three arrays of 16 MB (STREAM's triad); GB/s, all three counted
 *   chase_64m   dependent loads along a random cycle through 64 MB, one load a cache line; million loads a second
 */
#include <stdint.h>
#include <string.h>

#include "rate.h"

enum { COPY_BYTES = 32 << 20, TRIAD_ITEMS = (16 << 20) / 8, CHASE_LINES = (64 << 20) / 64, LINE_WORDS = 8 };

static char *from, *to;
static double *a, *b, *c;
static uint64_t *cycle;
static volatile uint64_t end_of_chase;

static void *area(size_t bytes)
{
    void *memory = aligned_alloc(4096, bytes);

    require(memory != NULL, "memory: not enough");
    memset(memory, 1, bytes);
    return memory;
}

static void copies(unsigned long n)
{
    while (n--) {
        memcpy(to, from, COPY_BYTES);
        __asm__ volatile("" ::: "memory");
    }
}

static void triads(unsigned long n)
{
    while (n--) {
        for (size_t i = 0; i < TRIAD_ITEMS; i++)
            a[i] = b[i] + 3.0 * c[i];
        __asm__ volatile("" ::: "memory");
    }
}

static void loads(unsigned long n)
{
    uint64_t line = end_of_chase;

    while (n--)
        line = cycle[line * LINE_WORDS];
    end_of_chase = line;
}

/* Sattolo's shuffle: one cycle through all lines. */
static void make_cycle(void)
{
    uint64_t random = 88172645463325252u;

    cycle = area((size_t)CHASE_LINES * 64);
    for (uint64_t i = 0; i < CHASE_LINES; i++)
        cycle[i * LINE_WORDS] = i;
    for (uint64_t i = CHASE_LINES - 1; i > 0; i--) {
        uint64_t other, kept = cycle[i * LINE_WORDS];

        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        other = random % i;
        cycle[i * LINE_WORDS] = cycle[other * LINE_WORDS];
        cycle[other * LINE_WORDS] = kept;
    }
}

int main(int count, char **names)
{
    for (int i = 1; i < count; i++) {
        if (strcmp(names[i], "mem_copy") == 0) {
            from = area(COPY_BYTES), to = area(COPY_BYTES);
            print_row(names[i], rate_of(copies, 1) * 2 * COPY_BYTES / 1e9);
            require(memcmp(from, to, COPY_BYTES) == 0, "mem_copy: the copy differs");
            free(from), free(to);
        } else if (strcmp(names[i], "mem_triad") == 0) {
            a = area(TRIAD_ITEMS * 8), b = area(TRIAD_ITEMS * 8), c = area(TRIAD_ITEMS * 8);
            for (size_t k = 0; k < TRIAD_ITEMS; k++)
                b[k] = 1.0, c[k] = 2.0;
            print_row(names[i], rate_of(triads, 1) * 3 * 8 * TRIAD_ITEMS / 1e9);
            require(a[TRIAD_ITEMS / 3] == 7.0, "mem_triad: wrong sum");
            free(a), free(b), free(c);
        } else if (strcmp(names[i], "chase_64m") == 0) {
            make_cycle();
            print_row(names[i], rate_of(loads, 1000) / 1e6);
            free(cycle);
        } else {
            require(0, names[i]);
        }
    }
    return 0;
}
