/*
 * `sleepers N`: N threads, of which every 64th wakes each second and the others sleep until they are
 * killed. Says so once all are there.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static void *sleep_on(void *wakes)
{
	for (;;) {
		if (wakes)
			nanosleep(&(struct timespec){ 1, 0 }, NULL);
		else
			pause();
	}
	return NULL;
}

int main(int argc, char **argv)
{
	long count = argc > 1 ? atol(argv[1]) : 0;
	pthread_attr_t small;
	pthread_t thread;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 32768);
	pthread_attr_setguardsize(&small, 0);
	/* this one is a thread too */
	for (long n = 1; n < count; n++) {
		int rc = pthread_create(&thread, &small, sleep_on, n % 64 ? NULL : &small);
		if (rc) {
			fprintf(stderr, "sleepers: thread %ld: error %d\n", n, rc);
			return 1;
		}
	}
	printf("%ld threads\n", count);
	fflush(stdout);
	sleep_on(NULL);
}
