/* Reads, then writes, the address given in hex from user mode. Killed by SIGSEGV if it may not. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
	volatile uint8_t *at;

	if (argc != 3)
		return 64;
	at = (volatile uint8_t *)(uintptr_t)strtoull(argv[1], NULL, 16);
	if (argv[2][0] == 'r')
		printf("%02x\n", *at);
	else
		*at = 0;
	return 0;
}
