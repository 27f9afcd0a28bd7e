/*
 * Prints a line every second until it is killed:
 *   CLOCK monotonic realtime late_us_median late_us_max
 * both clocks in seconds, and how late a sleep of 1 ms was, over 20 sleeps. In between it reads both clocks as fast as it can
 * and prints BACKWARDS when one of them steps back. It runs before everything else on its processor, so that what it prints
 * is the clocks' doing and not the load's.
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { SLEEPS = 20, READS = 20000 };

static double now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int by_value(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;

    return (a > b) - (a < b);
}

static void look_for_steps_back(clockid_t clock, const char *name)
{
    double last = now(clock);

    for (int i = 0; i < READS; i++) {
        double next = now(clock);

        if (next < last)
            printf("BACKWARDS %s by %.9f s\n", name, last - next);
        last = next;
    }
}

int main(void)
{
    struct sched_param highest = { .sched_priority = 50 };
    double late[SLEEPS];

    sched_setscheduler(0, SCHED_FIFO, &highest);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (;;) {
        struct timespec millisecond = { 0, 1000000 }, rest = { 0, 950000000 };

        for (int i = 0; i < SLEEPS; i++) {
            double begin = now(CLOCK_MONOTONIC);

            nanosleep(&millisecond, NULL);
            late[i] = (now(CLOCK_MONOTONIC) - begin - 1e-3) * 1e6;
        }
        qsort(late, SLEEPS, sizeof late[0], by_value);
        look_for_steps_back(CLOCK_MONOTONIC, "monotonic");
        look_for_steps_back(CLOCK_REALTIME, "realtime");
        /* Both clocks are read at the last moment before the line leaves. */
        printf("CLOCK %.6f %.6f %.0f %.0f\n", now(CLOCK_MONOTONIC), now(CLOCK_REALTIME), late[SLEEPS / 2], late[SLEEPS - 1]);
        nanosleep(&rest, NULL);
    }
}
