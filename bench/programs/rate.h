/*
 * What the benchmark programs share: a clock, a time-boxed rate, and the form of a result.
 *
 * A rate is measured by calling `work(n)` with n grown until one call takes a quarter of the box, then one call that fills
 * it; the harness takes the median of many such measurements. The box is BENCH_BOX_MS milliseconds (1000 when unset), so a
 * slow machine needs no longer than a fast one.
 */
#ifndef HOSPES_BENCH_RATE_H
#define HOSPES_BENCH_RATE_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef void (*work_function)(unsigned long n);

static inline double seconds_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline double seconds_of(work_function work, unsigned long n)
{
    double begin = seconds_now();

    work(n);
    return seconds_now() - begin;
}

static inline double box_seconds(void)
{
    const char *text = getenv("BENCH_BOX_MS");
    double box = text ? atof(text) / 1000.0 : 1.0;

    return box > 0.001 ? box : 0.001;
}

/* Units of work a second. `step` is the smallest sensible n. */
static inline double rate_of(work_function work, unsigned long step)
{
    double box = box_seconds(), took;
    unsigned long n = step;

    while ((took = seconds_of(work, n)) < box / 4)
        n *= 2;
    if (took < box) {
        n = (unsigned long)((double)n * box / took);
        n -= n % step;
    }
    return (double)n / seconds_of(work, n);
}

static inline void print_row(const char *name, double value)
{
    printf("ROW %s %.6g\n", name, value);
    fflush(stdout);
}

/* For a program that finds its own result wrong: a rate of wrong results is worth nothing. */
static inline void require(int condition, const char *what)
{
    if (!condition) {
        printf("WRONG %s\n", what);
        fflush(stdout);
        exit(1);
    }
}

#endif
