/* A program that embeds the library, told what to do by lines on its input; each is answered by one
 * line, "ok ..." or "error NAME MESSAGE". Used by capi_test.py, which kills it, and daemons under
 * it.
 *
 *     open DIRECTORY | connect DIRECTORY | close
 *     create NAME BYTES | clone SOURCE NAME | snapshot VOLUME NAME | remove NAME | share NAME 0|1
 *     list KINDS                               ok NAME...
 *     disk NAME READ-ONLY | end                opens a volume, closes it
 *     write OFFSET LENGTH BYTE | flush | discard OFFSET LENGTH | prefetch
 *     sum OFFSET LENGTH                        ok SUM, of what is read
 *     map NAME MAPPINGS | mapped | unmap       ok SUM SIZE MAPPED GATHERED MAPPINGS, and again
 *     threads COUNT                            reads the open volume by so many at once */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <stellarium.h>
#include <string.h>

enum { LINE = 4096, PIECE = 1 << 20 };

static stellarium_store* store;
static stellarium_volume* volume;
static stellarium_mapping* mapping;

/* FNV-1a. */
static uint64_t checksum(uint64_t sum, const unsigned char* bytes, uint64_t size) {
    for (uint64_t i = 0; i < size; i++)
        sum = (sum ^ bytes[i]) * 0x100000001b3;
    return sum;
}
#define EMPTY 0xcbf29ce484222325u

static int sum_of(uint64_t offset, uint64_t length, uint64_t* sum) {
    unsigned char* piece = malloc(PIECE);
    int result = STELLARIUM_OK;
    *sum = EMPTY;
    while (length > 0 && result == STELLARIUM_OK) {
        const uint64_t now = length < PIECE ? length : PIECE;
        result = stellarium_read(volume, offset, piece, now);
        *sum = checksum(*sum, piece, now);
        offset += now;
        length -= now;
    }
    free(piece);
    return result;
}

static void answer(int result) {
    if (result == STELLARIUM_OK)
        printf("ok\n");
    else
        printf("error %s %s\n", stellarium_error_name(result), stellarium_last_error());
}

static void answer_mapping(void) {
    stellarium_mapping_info info = {.size = sizeof info};
    const uint64_t size = stellarium_mapping_size(mapping);
    stellarium_mapping_get_info(mapping, &info);
    printf("ok %016llx %llu %llu %llu %llu\n",
           (unsigned long long)checksum(EMPTY, stellarium_mapping_address(mapping), size),
           (unsigned long long)size, (unsigned long long)info.mapped_bytes,
           (unsigned long long)info.gathered_bytes, (unsigned long long)info.mappings);
}

static int print_name(void* user, const stellarium_info* info) {
    (void)user;
    printf(" %s", info->name);
    return 0;
}

static void* read_all(void* user) {
    uint64_t* sum = user;
    if (sum_of(0, stellarium_volume_size(volume), sum) != STELLARIUM_OK)
        *sum = 0;
    return NULL;
}

static void read_by_threads(unsigned count) {
    pthread_t threads[64];
    uint64_t sums[64] = {0};
    count = count < 64 ? count : 64;
    for (unsigned i = 0; i < count; i++)
        pthread_create(&threads[i], NULL, read_all, &sums[i]);
    for (unsigned i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    for (unsigned i = 1; i < count; i++)
        if (sums[i] != sums[0]) {
            printf("error differs thread %u\n", i);
            return;
        }
    printf("ok %016llx\n", (unsigned long long)sums[0]);
}

static void write_pattern(uint64_t offset, uint64_t length, int byte) {
    unsigned char* data = malloc(length);
    memset(data, byte, length);
    answer(stellarium_write(volume, offset, data, length));
    free(data);
}

static void obey(const char* verb, const char* a, const char* b, const char* c) {
    const uint64_t x = strtoull(a, NULL, 10), y = strtoull(b, NULL, 10);
    if (strcmp(verb, "open") == 0)
        answer(stellarium_open(a, NULL, &store));
    else if (strcmp(verb, "connect") == 0)
        answer(stellarium_connect(a, NULL, &store));
    else if (strcmp(verb, "close") == 0)
        answer(stellarium_close(store));
    else if (strcmp(verb, "create") == 0)
        answer(stellarium_volume_create(store, a, y));
    else if (strcmp(verb, "clone") == 0)
        answer(stellarium_clone(store, a, &b, 1));
    else if (strcmp(verb, "snapshot") == 0)
        answer(stellarium_snapshot(store, a, b));
    else if (strcmp(verb, "remove") == 0)
        answer(stellarium_remove(store, a));
    else if (strcmp(verb, "share") == 0)
        answer(stellarium_set_shareable(store, a, (int)y));
    else if (strcmp(verb, "list") == 0) {
        printf("ok");
        const int result = stellarium_list(store, (uint32_t)x, print_name, NULL);
        printf(result == STELLARIUM_OK ? "\n" : " error\n");
    } else if (strcmp(verb, "disk") == 0) {
        const stellarium_volume_options options = {.size = sizeof options,
                                                   .read_only = (uint32_t)y};
        answer(stellarium_volume_open(store, a, &options, &volume));
    } else if (strcmp(verb, "end") == 0)
        answer(stellarium_volume_close(volume));
    else if (strcmp(verb, "write") == 0)
        write_pattern(x, y, atoi(c));
    else if (strcmp(verb, "flush") == 0)
        answer(stellarium_flush(volume));
    else if (strcmp(verb, "discard") == 0)
        answer(stellarium_discard(volume, x, y));
    else if (strcmp(verb, "prefetch") == 0)
        answer(stellarium_prefetch(volume, 0, 0));
    else if (strcmp(verb, "sum") == 0) {
        uint64_t sum = 0;
        const int result = sum_of(x, y, &sum);
        if (result == STELLARIUM_OK)
            printf("ok %016llx\n", (unsigned long long)sum);
        else
            answer(result);
    } else if (strcmp(verb, "map") == 0) {
        const stellarium_map_options options = {.size = sizeof options,
                                                .max_mappings = (uint32_t)y};
        const int result = stellarium_map(store, a, &options, &mapping);
        if (result == STELLARIUM_OK)
            answer_mapping();
        else
            answer(result);
    } else if (strcmp(verb, "mapped") == 0)
        answer_mapping();
    else if (strcmp(verb, "unmap") == 0)
        answer(stellarium_unmap(mapping));
    else if (strcmp(verb, "threads") == 0)
        read_by_threads((unsigned)x);
    else
        printf("error unknown '%s'\n", verb);
}

int main(void) {
    char line[LINE];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char verb[32] = "", a[1024] = "", b[1024] = "", c[64] = "";
        if (sscanf(line, "%31s %1023s %1023s %63s", verb, a, b, c) >= 1)
            obey(verb, a, b, c);
        fflush(stdout);
    }
    return 0;
}
