/* Sleeps in pause(2) until it is killed: a thread inside a kernel function, for as long as wanted. */
#include <unistd.h>

int main(void)
{
	for (;;)
		pause();
}
