/* Generations of processes: each has children that have children, all write into what they share until they do. Prints how many were right. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BYTES = 1 << 18, WIDTH = 3, DEPTH = 5 };

static unsigned char *area;

static unsigned checked(int depth)
{
    unsigned good = 1;

    for (int i = 0; i < BYTES; i += 64)
        good &= area[i] == (unsigned char)((i >> 6) + depth);
    for (int i = 0; i < BYTES; i += 64)
        area[i]++;
    return good;
}

/* The exit status says whether all below were right. */
static int generation(int depth)
{
    int good = (int)checked(depth);

    for (int i = 0; i < WIDTH && depth < DEPTH; i++) {
        pid_t child = fork();

        if (child == 0)
            _exit(generation(depth + 1));
        if (child < 0)
            good = 0;
    }
    for (int status; wait(&status) > 0;)
        good &= status == 0;
    return !good;
}

int main(void)
{
    int good = 0;

    area = malloc(BYTES);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < BYTES; i++)
            area[i] = (unsigned char)(i >> 6);
        good += generation(0) == 0;
    }
    printf("forks: %d of 4\n", good);
    return good != 4;
}
