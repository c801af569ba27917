/*
 * The limit: what it costs to send() an event to each of many sockets, with nothing around it.
 *
 * One epoll loop that answers with the head, the chunks and the first bytes that flask_eventstream
 * has behind gunicorn, so that both send the same number of bytes. It is no server to be used: it
 * keeps nothing for a client that lags, knows no history and no heartbeats, and takes a request only
 * if it fits into its buffer. A client whose socket would block is dropped.
 *
 *     GET /stream   POST /publish (the body is the data)   POST /burst?n=100
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_DESCRIPTORS 65536
#define MOST_REQUEST_BYTES (4 << 20)
#define BACKLOG 4096
#define PATIENCE_MS 5000
#define READY_AT_ONCE 1024

static const char FIRST_BYTES[] = ":\nretry: 3000\n";
static const char DONE[] = "HTTP/1.1 204 No Content\r\nServer: loop\r\nConnection: keep-alive\r\n\r\n";

static int epoll_fd;
static int subscribers[MOST_DESCRIPTORS];
static int places[MOST_DESCRIPTORS]; /* where a descriptor stands among the subscribers, plus 1 */
static int subscriber_count;
static unsigned long sequence;
static char request[MOST_REQUEST_BYTES + 1];
static char frame[MOST_REQUEST_BYTES + 256];

static void leave(int fd)
{
    int place = places[fd];
    if (place) {
        int last = subscribers[--subscriber_count];
        subscribers[place - 1] = last;
        places[last] = place;
        places[fd] = 0;
    }
    close(fd);
}

static void watch(int fd)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void accept_all(int listener)
{
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        watch(fd);
    }
}

static int send_whole(int fd, const char *bytes, size_t size)
{
    return send(fd, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)size;
}

static void subscribe(int fd)
{
    char head[1024];
    int size = snprintf(head, sizeof head,
        "HTTP/1.1 200 OK\r\nServer: gunicorn\r\nDate: Fri, 20 Nov 2026 00:00:00 GMT\r\n"
        "Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n"
        "Content-Type: text/event-stream; charset=utf-8\r\n"
        "Cache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n\r\n%zx\r\n%s\r\n",
        strlen(FIRST_BYTES), FIRST_BYTES);
    if (!send_whole(fd, head, size)) {
        leave(fd);
        return;
    }
    subscribers[subscriber_count++] = fd;
    places[fd] = subscriber_count;
}

static void publish(const char *before, const char *data, int size)
{
    char id[64];
    int id_size = snprintf(id, sizeof id, "id: c0ffee-%lu\ndata: ", ++sequence);
    int bytes = id_size + (int)strlen(before) + size + 2;
    int framed = sprintf(frame, "%x\r\n%s%s%.*s\n\n\r\n", bytes, id, before, size, data);
    /* From the end, since a subscriber that leaves is replaced by the last. */
    for (int place = subscriber_count; place-- > 0;)
        if (!send_whole(subscribers[place], frame, framed))
            leave(subscribers[place]);
}

static void publish_many(int count, const char *data, int size)
{
    for (int number = 0; number < count; number++) {
        char before[32];
        snprintf(before, sizeof before, "%d@", number);
        publish(before, data, size);
    }
}

static long content_length(void)
{
    const char *header = strcasestr(request, "\r\ncontent-length:");
    return header ? atol(header + strlen("\r\ncontent-length:")) : 0;
}

/* Read what is still missing of a body; returns whether it is whole. */
static int read_rest(int fd, long have, long whole)
{
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    while (have < whole) {
        if (whole > MOST_REQUEST_BYTES || poll(&readable, 1, PATIENCE_MS) <= 0)
            return 0;
        ssize_t more = recv(fd, request + have, whole - have, 0);
        if (more <= 0)
            return 0;
        have += more;
    }
    return 1;
}

static void serve(int fd)
{
    ssize_t have = recv(fd, request, MOST_REQUEST_BYTES, 0);
    if (have < 0 && errno == EAGAIN)
        return;
    request[have > 0 ? have : 0] = 0;
    char *body = have > 0 ? strstr(request, "\r\n\r\n") : NULL;
    if (!body) {
        leave(fd);
        return;
    }
    body += 4;
    long size = content_length();
    if (!read_rest(fd, have, (body - request) + size)) {
        leave(fd);
        return;
    }
    if (!strncmp(request, "GET /stream", 11)) {
        subscribe(fd);
        return;
    }
    if (!strncmp(request, "POST /burst?n=", 14))
        publish_many(atoi(request + 14), body, (int)size);
    else
        publish("", body, (int)size);
    send_whole(fd, DONE, strlen(DONE));
}

static int listen_on(int port)
{
    int one = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    /* Accepted sockets inherit it. */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG)) {
        perror("loop");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv)
{
    struct epoll_event ready[READY_AT_ONCE];
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 8000);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    watch(listener);
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, READY_AT_ONCE, -1);
        for (int place = 0; place < count; place++) {
            if (ready[place].data.fd == listener)
                accept_all(listener);
            else
                serve(ready[place].data.fd);
        }
    }
}
