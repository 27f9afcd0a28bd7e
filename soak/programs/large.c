/* A working set of MEGABYTES that is written and read in several orders: large MEGABYTES. Prints what it read; exits with 1 when something has changed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int main(int count, char **arguments)
{
    uint64_t words = (count > 1 ? strtoull(arguments[1], NULL, 10) : 16) << 17, *area, wrong = 0, sum = 0, at = 1;

    area = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        return 1;
    for (uint64_t i = 0; i < words; i += 16)
        area[i] = i * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 2000000; i++) {
        uint64_t place;

        at = at * 6364136223846793005u + 1442695040888963407u;
        place = (at >> 20) % words & ~15ull;
        wrong += area[place] != place * 0x9e3779b97f4a7c15u;
        sum += area[place];
    }
    for (uint64_t i = words; i >= 16; i -= 16)
        wrong += area[i - 16] != (i - 16) * 0x9e3779b97f4a7c15u;
    printf("large: sum %lx wrong %lu\n", sum, wrong);
    return wrong != 0;
}
