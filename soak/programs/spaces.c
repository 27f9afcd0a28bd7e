/*
 * Two threads that compute in one address space which changes under them: mappings come and go, rights change, frames are shared with children after fork,
 * and code is written by one thread and run by the other. Prints sums that do not depend on the order of things; exits with 1 when one is wrong.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 64, ROUNDS = 120 };

static atomic_int stop, generation, failures;
static unsigned char *code;

static uint64_t mix(uint64_t word, int rounds)
{
    for (int i = 0; i < rounds; i++)
        word = (word ^ word >> 29) * 0xbf58476d1ce4e5b9u + (uint64_t)i;
    return word;
}

static void wrong(const char *what)
{
    fprintf(stderr, "spaces: %s\n", what);
    atomic_fetch_add(&failures, 1);
}

/* Computes, and keeps a table of its own right. */
static void *compute(void *argument)
{
    enum { WORDS = 1 << 16 };
    uint64_t *table = malloc(WORDS * sizeof *table), seed = (uint64_t)(uintptr_t)argument;
    uint64_t want = mix(seed, 200000);

    for (int i = 0; i < WORDS; i++)
        table[i] = seed + (uint64_t)i;
    for (uint64_t round = 1; !atomic_load(&stop); round++) {
        if (mix(seed, 200000) != want)
            wrong("a computation went wrong");
        for (int i = 0; i < WORDS; i++)
            table[i] += 3;
        for (int i = 0; i < WORDS; i += 97)
            if (table[i] != seed + (uint64_t)i + 3 * round)
                wrong("a table has changed by itself");
    }
    free(table);
    return NULL;
}

/* Runs what the other thread has written. */
static void *run_code(void *argument)
{
    int last = 0;

    (void)argument;
    while (!atomic_load(&stop)) {
        int before = atomic_load(&generation), got, after;
        uint32_t zero = 0, unused;

        /* New code is seen only behind an instruction that serialises. */
        __asm__ volatile("cpuid" : "+a"(zero), "=c"(unused) : : "ebx", "edx", "memory");
        got = ((int (*)(void))(uintptr_t)code)();
        after = atomic_load(&generation);
        if (got < last || got < before || got > after + 1)
            wrong("old code was run");
        last = got;
        mix((uint64_t)got, 3000);
    }
    return NULL;
}

static void write_code(int value)
{
    uint64_t bytes = 0xb8 | (uint64_t)(uint32_t)value << 8 | 0xc3ull << 40;

    atomic_store((_Atomic uint64_t *)code, bytes);
    atomic_store(&generation, value);
}

/* A region that is mapped, written, protected, given to a child, and unmapped. */
static uint64_t change_space(int round)
{
    unsigned char *area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    int status;
    pid_t child;

    for (int i = 0; i < PAGES; i++)
        memset(area + i * PAGE, round + i, PAGE);
    mprotect(area, PAGES / 2 * PAGE, PROT_READ);
    mix(1, 20000);
    child = fork();
    if (child == 0) {
        for (int i = PAGES / 2; i < PAGES; i++)
            area[i * PAGE + 5]++;
        for (int i = 0; i < PAGES; i++)
            if (area[i * PAGE + 6] != (unsigned char)(round + i) || area[i * PAGE + 5] != (unsigned char)(round + i + (i >= PAGES / 2)))
                _exit(1);
        _exit(mix(7, 100000) == 0);
    }
    for (int i = PAGES / 2; i < PAGES; i++)
        area[i * PAGE + 5] += 2;
    mprotect(area, PAGES * PAGE, PROT_READ | PROT_WRITE);
    for (int i = 0; i < PAGES; i++)
        area[i * PAGE + 7]++;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        wrong("a child saw its parent's writes, or lost its own");
    for (int i = 0; i < PAGES; i++)
        sum += area[i * PAGE + 5] + area[i * PAGE + 7] + area[i * PAGE + 4095];
    madvise(area, PAGE, MADV_DONTNEED);
    if (area[100] != 0)
        wrong("a page that was given up still has its content");
    munmap(area, PAGES * PAGE);
    return sum;
}

int main(void)
{
    pthread_t threads[2];
    uint64_t sum = 0;

    code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    write_code(1);
    if (pthread_create(&threads[0], NULL, compute, (void *)5) != 0 || pthread_create(&threads[1], NULL, run_code, NULL) != 0)
        return 1;
    for (int round = 0; round < ROUNDS; round++) {
        sum += change_space(round);
        write_code(round + 2);
        sum += mix(sum, 300000) & 1;
    }
    atomic_store(&stop, 1);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    printf("spaces: sum %lu last %d failures %d\n", sum, atomic_load(&generation), atomic_load(&failures));
    return atomic_load(&failures) != 0;
}
