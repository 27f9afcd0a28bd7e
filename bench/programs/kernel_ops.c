/*
 * Rates of single kernel operations: kernel_ops NAME..., NAME one of the table at the end. All processes stay on one
 * processor, so that a machine with several has no advantage over a guest with one. Unit: operations a second.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rate.h"

enum { PIPE_BYTES = 512, FAULT_PAGES = 4096, PAGE = 4096 };
static const char EXEC_PROGRAM[] = "/bench/nothing";
static const char TMPFS_FILE[] = "/tmp/kernel_ops.file";

static void getppid_calls(unsigned long n)
{
    while (n--)
        syscall(SYS_getppid);
}

static void pipe_round_trips(unsigned long n)
{
    char buffer[PIPE_BYTES] = { 0 };
    int ends[2];

    require(pipe(ends) == 0, "pipe: no pipe");
    while (n--) {
        require(write(ends[1], buffer, sizeof buffer) == PIPE_BYTES, "pipe: short write");
        require(read(ends[0], buffer, sizeof buffer) == PIPE_BYTES, "pipe: short read");
    }
    close(ends[0]);
    close(ends[1]);
}

static void context_switches(unsigned long n)
{
    int there[2], back[2];
    char byte = 0;
    pid_t child;

    require(pipe(there) == 0 && pipe(back) == 0, "context_switch: no pipe");
    child = fork();
    require(child >= 0, "context_switch: no child");
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    while (n--) {
        require(write(there[1], &byte, 1) == 1, "context_switch: short write");
        require(read(back[0], &byte, 1) == 1, "context_switch: short read");
    }
    close(there[1]);
    close(back[0]);
    waitpid(child, NULL, 0);
}

static void reap(pid_t child, const char *what)
{
    int status;

    require(child > 0 && waitpid(child, &status, 0) == child && status == 0, what);
}

static void fork_exits(unsigned long n)
{
    while (n--) {
        pid_t child = fork();

        if (child == 0)
            _exit(0);
        reap(child, "fork_exit: child");
    }
}

static void fork_execs(unsigned long n)
{
    while (n--) {
        pid_t child = fork();

        if (child == 0) {
            execl(EXEC_PROGRAM, EXEC_PROGRAM, (char *)NULL);
            _exit(127);
        }
        reap(child, "fork_exec: child");
    }
}

static void page_faults(unsigned long n)
{
    for (; n >= FAULT_PAGES; n -= FAULT_PAGES) {
        char *area = mmap(NULL, FAULT_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        require(area != MAP_FAILED, "page_fault: no memory");
        madvise(area, FAULT_PAGES * PAGE, MADV_NOHUGEPAGE);
        for (int page = 0; page < FAULT_PAGES; page++)
            ((volatile char *)area)[page * PAGE] = 1;
        munmap(area, FAULT_PAGES * PAGE);
    }
}

static void mmap_unmaps(unsigned long n)
{
    while (n--) {
        void *area = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        require(area != MAP_FAILED && munmap(area, 16 * PAGE) == 0, "mmap_unmap: refused");
    }
}

static volatile sig_atomic_t handled;

static void count_signal(int number)
{
    (void)number;
    handled = handled + 1;
}

static void signals(unsigned long n)
{
    struct sigaction action;
    pid_t self = getpid();

    memset(&action, 0, sizeof action);
    action.sa_handler = count_signal;
    sigaction(SIGUSR1, &action, NULL);
    handled = 0;
    for (unsigned long i = 0; i < n; i++)
        kill(self, SIGUSR1);
    require((unsigned long)handled == n, "signal: lost");
}

static void tmpfs_files(unsigned long n)
{
    while (n--) {
        int file = open(TMPFS_FILE, O_CREAT | O_EXCL | O_WRONLY, 0600);

        require(file >= 0 && close(file) == 0 && unlink(TMPFS_FILE) == 0, "tmpfs_files: refused");
    }
}

static const struct {
    const char *name;
    work_function work;
    unsigned long step;
} TABLE[] = {
    { "getppid", getppid_calls, 1000 },
    { "pipe", pipe_round_trips, 100 },
    { "context_switch", context_switches, 100 },
    { "fork_exit", fork_exits, 5 },
    { "fork_exec", fork_execs, 2 },
    { "page_fault", page_faults, FAULT_PAGES },
    { "mmap_unmap", mmap_unmaps, 100 },
    { "signal", signals, 100 },
    { "tmpfs_files", tmpfs_files, 50 },
};

int main(int count, char **names)
{
    cpu_set_t first;

    CPU_ZERO(&first);
    CPU_SET(sched_getcpu(), &first);
    sched_setaffinity(0, sizeof first, &first);
    for (int i = 1; i < count; i++) {
        size_t entry = 0;

        while (entry < sizeof TABLE / sizeof TABLE[0] && strcmp(TABLE[entry].name, names[i]) != 0)
            entry++;
        require(entry < sizeof TABLE / sizeof TABLE[0], names[i]);
        print_row(TABLE[entry].name, rate_of(TABLE[entry].work, TABLE[entry].step));
    }
    return 0;
}
