/*
 * Copies of one piece of work at once, each a process of its own: how much each of them got done in the same time.
 */
#ifndef HOSPES_BENCH_JOBS_H
#define HOSPES_BENCH_JOBS_H

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rate.h"

enum { JOBS_MAX = 64 };

/* Units of work a second: of the slowest and of the fastest copy, and of all together. */
struct jobs {
    double slowest, fastest, total;
};

struct job_board {
    double begin;
    double rate[JOBS_MAX];
};

/* Looks at the clock once in a millisecond or two: a copy is to compute, and `step` may be a few microseconds of work. */
static inline double rate_until(work_function work, unsigned long step, double begin, double end)
{
    unsigned long done = 0, n = step;
    double now = seconds_now(), before;

    do {
        before = now;
        work(n);
        done += n;
        now = seconds_now();
        if (now - before < 0.001)
            n *= 2;
    } while (now < end);
    return (double)done / (now - begin);
}

/* All copies begin when the last of them is there, and work for one box. `check` ends a copy whose result is wrong. */
static inline struct jobs jobs_at_once(work_function work, unsigned long step, void (*check)(void), int count)
{
    struct job_board *board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct jobs result = { 0.0, 0.0, 0.0 };
    int gate[2];
    pid_t children[JOBS_MAX];

    require(count >= 1 && count <= JOBS_MAX, "jobs: too many copies");
    require(board != MAP_FAILED && pipe(gate) == 0, "jobs: no board");
    for (int i = 0; i < count; i++) {
        children[i] = fork();
        require(children[i] >= 0, "jobs: no child");
        if (children[i] == 0) {
            char byte;

            /* Opens when the parent closes its end. */
            close(gate[1]);
            if (read(gate[0], &byte, 1) != 0)
                _exit(1);
            board->rate[i] = rate_until(work, step, board->begin, board->begin + box_seconds());
            check();
            _exit(0);
        }
    }
    board->begin = seconds_now();
    close(gate[1]);
    close(gate[0]);
    for (int i = 0; i < count; i++) {
        int status;

        require(waitpid(children[i], &status, 0) == children[i] && status == 0, "jobs: a copy failed");
        if (i == 0 || board->rate[i] < result.slowest)
            result.slowest = board->rate[i];
        if (board->rate[i] > result.fastest)
            result.fastest = board->rate[i];
        result.total += board->rate[i];
    }
    munmap(board, sizeof *board);
    return result;
}

#endif
