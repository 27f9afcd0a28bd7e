/*
 * Threads, locks, condition variables, thread-local storage, atomics and signals between threads; prints sums that do not
 * depend on the order of things, and exits with 1 when one is wrong.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

enum { THREADS = 4, ROUNDS = 20000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long guarded;
static int turn;
static atomic_long counted, exchanged;
static atomic_int signals_seen;
static __thread long own;

static void on_signal(int number)
{
    (void)number;
    atomic_fetch_add(&signals_seen, 1);
}

static void *work(void *argument)
{
    long number = (long)argument;

    for (int i = 0; i < ROUNDS; i++) {
        long seen;

        pthread_mutex_lock(&lock);
        guarded++;
        pthread_mutex_unlock(&lock);
        atomic_fetch_add(&counted, number + 1);
        seen = atomic_load(&exchanged);
        while (!atomic_compare_exchange_weak(&exchanged, &seen, seen + 3))
            continue;
        own += number;
    }
    for (int i = 0; i < 200; i++) {
        pthread_mutex_lock(&lock);
        while (turn % THREADS != number)
            pthread_cond_wait(&changed, &lock);
        turn++;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return (void *)own;
}

int main(void)
{
    pthread_t threads[THREADS];
    long sum_of_own = 0;

    signal(SIGUSR1, on_signal);
    for (long i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)i) != 0)
            return 1;
    for (int i = 0; i < 100; i++) {
        int before = atomic_load(&signals_seen);

        kill(getpid(), SIGUSR1);
        while (atomic_load(&signals_seen) == before)
            usleep(100);
    }
    for (int i = 0; i < THREADS; i++) {
        void *result;

        pthread_join(threads[i], &result);
        sum_of_own += (long)result;
    }
    printf("guarded %ld counted %ld exchanged %ld own %ld turns %d signals %d\n", guarded, atomic_load(&counted),
           atomic_load(&exchanged), sum_of_own, turn, atomic_load(&signals_seen));
    return guarded != (long)THREADS * ROUNDS || atomic_load(&exchanged) != 3L * THREADS * ROUNDS ||
           sum_of_own != 6L * ROUNDS || turn != THREADS * 200;
}
