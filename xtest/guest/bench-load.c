/*
 * The load of `xtest bench`: a client and a server that talk over TCP on the loopback device, connecting
 * anew now and then, and a writer that has each block reach the disk given. spin-workload is the
 * other part, processes and files. Each part rests a little after every step, so that the load is the
 * same for guests of any size. Runs until killed.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 7777
#define BLOCK 16384
#define BLOCKS 128

static void rest(void)
{
	nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void serve(int at)
{
	char text[512];
	ssize_t n;

	for (;;) {
		int peer = accept(at, NULL, NULL);
		if (peer < 0)
			fail("accept");
		while ((n = read(peer, text, sizeof text)) > 0)
			if (write(peer, text, (size_t)n) != n)
				break;
		close(peer);
	}
}

static void talk(const struct sockaddr_in *to)
{
	char text[512];

	memset(text, 0x5a, sizeof text);
	for (;;) {
		int peer = socket(AF_INET, SOCK_STREAM, 0);
		if (peer < 0 || connect(peer, (const struct sockaddr *)to, sizeof *to))
			fail("connect");
		for (int n = 0; n < 32; n++) {
			if (write(peer, text, sizeof text) < 0 || read(peer, text, sizeof text) <= 0)
				fail("talking");
			rest();
		}
		close(peer);
	}
}

static void fill(int disk)
{
	static char block[BLOCK];

	for (unsigned int n = 0;; n++) {
		memset(block, (int)n, sizeof block);
		if (pwrite(disk, block, sizeof block, (off_t)(n % BLOCKS) * BLOCK) != BLOCK ||
		    fdatasync(disk))
			fail("writing to the disk");
		rest();
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int on = 1, at = socket(AF_INET, SOCK_STREAM, 0);
	int disk = argc > 1 ? open(argv[1], O_WRONLY) : -1;

	here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (disk < 0)
		fail("opening the disk");
	if (at < 0 || setsockopt(at, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
	    bind(at, (struct sockaddr *)&here, sizeof here) || listen(at, 4))
		fail("listening");
	if (!fork())
		serve(at);
	if (!fork())
		talk(&here);
	fill(disk);
}
